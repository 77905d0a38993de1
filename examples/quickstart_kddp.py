"""quickstart.py with five more lines, marked `# kddp`: the loss and the pruner in an existing training loop.

    python quickstart.py && python quickstart_kddp.py

The teacher is the model that quickstart.py saved. The student starts at the same width and becomes smaller.
"""

import torch
from quickstart import NeuralNetwork, load_data, test
from torch.utils.data import DataLoader

import kddp_ext  # kddp


def train(dataloader, model, teacher, pruner, optimizer):
    model.train()
    for X, y in dataloader:  # noqa: N806 - the quick-start's names
        pred = model(X)
        soft = teacher(X)  # kddp
        loss = kddp_ext.fused_kd_l1_loss(pred, soft, y, pruner.activations, l1_weight=0.03)  # kddp

        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main():
    torch.manual_seed(0)
    training_data, test_data = load_data()
    train_dataloader = DataLoader(training_data, batch_size=64, shuffle=True)
    test_dataloader = DataLoader(test_data, batch_size=64)

    teacher = NeuralNetwork()
    teacher.load_state_dict(torch.load("model.pth", weights_only=True))
    teacher.eval().requires_grad_(False)

    model = NeuralNetwork()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pruner = kddp_ext.DynamicPruner(model, optimizer, example_inputs=(training_data[0][0][None],))  # kddp

    for epoch in range(15):
        train(train_dataloader, model, teacher, pruner, optimizer)
        print(f"Epoch {epoch + 1}: ", end="")
        test(test_dataloader, model)
        print(pruner.prune())  # kddp

    print(model)


if __name__ == "__main__":
    main()
