"""tensors_on, which lets one test run on several devices."""

import backends
import torch


def test_tensors_are_created_on_the_device_unless_a_call_names_one():
    with backends.tensors_on("meta"):
        leaf = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        assert leaf.device.type == "meta"
        assert leaf.requires_grad
        assert leaf.is_leaf
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert (leaf + 1).device.type == "meta"
    assert torch.randn(2).device.type == "cpu"


def test_values_are_those_of_the_cpu():
    def draw():
        return torch.randint(0, 99, (20,), generator=torch.Generator().manual_seed(3))

    with backends.tensors_on("cpu"):
        drawn = draw()
    assert torch.equal(drawn, draw())
