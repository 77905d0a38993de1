"""A plain training loop like PyTorch's quick start, without distillation and pruning.

    python quickstart.py

It trains a classifier of handwritten digits and saves it as model.pth, which is the teacher of quickstart_kddp.py.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class NeuralNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(8 * 8, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )

    def forward(self, x):
        return self.linear_relu_stack(self.flatten(x))


def load_data():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    dataset = TensorDataset(images, torch.tensor(digits.target))
    return random_split(dataset, [1437, 360], generator=torch.Generator().manual_seed(0))


def train(dataloader, model, loss_fn, optimizer):
    model.train()
    for X, y in dataloader:  # noqa: N806 - the quick-start's names
        pred = model(X)
        loss = loss_fn(pred, y)

        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test(dataloader, model):
    model.eval()
    correct = 0
    with torch.no_grad():
        for X, y in dataloader:  # noqa: N806
            correct += (model(X).argmax(1) == y).sum().item()
    print(f"Accuracy: {100 * correct / len(dataloader.dataset):.1f}%")


def main():
    torch.manual_seed(0)
    training_data, test_data = load_data()
    train_dataloader = DataLoader(training_data, batch_size=64, shuffle=True)
    test_dataloader = DataLoader(test_data, batch_size=64)

    model = NeuralNetwork()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for epoch in range(15):
        train(train_dataloader, model, loss_fn, optimizer)
        print(f"Epoch {epoch + 1}: ", end="")
        test(test_dataloader, model)

    torch.save(model.state_dict(), "model.pth")


if __name__ == "__main__":
    main()
