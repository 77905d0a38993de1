"""Makes a trained network smaller while it is distilled from what it was: the lines marked `# shrink`.

    python quickstart.py && python shrink.py

The network is the model that quickstart.py saved. It is its own teacher, and a copy of it loses neurons.
"""

import copy

import torch
from quickstart import NeuralNetwork, load_data, test
from torch.utils.data import DataLoader

import kddp_ext


def main():
    torch.manual_seed(0)
    training_data, test_data = load_data()
    train_dataloader = DataLoader(training_data, batch_size=64, shuffle=True)
    test_dataloader = DataLoader(test_data, batch_size=64)
    original = NeuralNetwork()
    original.load_state_dict(torch.load("model.pth", weights_only=True))
    test(test_dataloader, original.eval())

    model = copy.deepcopy(original)  # shrink
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pruner = kddp_ext.DynamicPruner(  # shrink
        model, optimizer, example_inputs=(training_data[0][0][None],),
        criterion="saliency", target_macs=0.1, target_steps=20, interval=6,
    )  # fmt: skip
    for _ in range(10):
        model.train()
        for X, y in train_dataloader:  # noqa: N806 - the quick-start's names
            pred = model(X)
            with torch.no_grad():
                soft = original(X)  # shrink
            loss = kddp_ext.fused_kd_l1_loss(pred, soft, y, pruner.activations)  # shrink
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if report := pruner.step():  # shrink
                print(report)
    test(test_dataloader, model.eval())
    kddp_ext.save_student("student.safetensors", model, pruner.history)  # shrink


if __name__ == "__main__":
    main()
