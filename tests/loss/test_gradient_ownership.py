"""A gradient that was handed out is never written again, however it was obtained and however it is kept.

Every test runs the same steps with eager PyTorch's loss and with ours, and compares all gradients.
"""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kddp_ext

TEMPERATURE, ALPHA = 4.0, 0.9


class Subclass(torch.Tensor):
    pass


def eager(student, teacher, labels):
    p, q = (F.log_softmax(x / TEMPERATURE, 1) for x in (teacher, student))
    kd = TEMPERATURE**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)
    return ALPHA * kd + (1 - ALPHA) * F.cross_entropy(student, labels)


def ours(student, teacher, labels):
    return kddp_ext.fused_kd_l1_loss(student, teacher, labels, temperature=TEMPERATURE, alpha=ALPHA)


def from_grad(loss_of, logits, *targets):
    loss = loss_of(logits, *targets)
    return loss, logits, torch.autograd.grad(loss, logits, retain_graph=True)[0]


def from_leaf(loss_of, logits, *targets):
    leaf = logits.detach().requires_grad_()
    loss = loss_of(leaf, *targets)
    loss.backward(retain_graph=True)
    gradient, leaf.grad = leaf.grad, None
    return loss, leaf, gradient


def from_hook(loss_of, logits, *targets):
    seen = []
    handle = logits.register_hook(seen.append)
    loss = loss_of(logits, *targets)
    loss.backward(retain_graph=True)
    handle.remove()
    return loss, logits, seen[0]


def from_prehook(loss_of, logits, *targets):
    seen = []
    handle = logits.grad_fn.register_prehook(lambda gradients: seen.append(gradients[0]))
    loss = loss_of(logits, *targets)
    loss.backward(retain_graph=True)
    handle.remove()
    return loss, logits, seen[0]


def from_retain_grad(loss_of, logits, *targets):
    logits.retain_grad()
    loss = loss_of(logits, *targets)
    loss.backward(retain_graph=True)
    gradient, logits.grad = logits.grad, None
    return loss, logits, gradient


def from_thread(loss_of, logits, *targets):
    found = []
    thread = threading.Thread(target=lambda: found.extend(from_grad(loss_of, logits, *targets)))
    thread.start()
    thread.join()
    return tuple(found)


def from_checkpoint(loss_of, logits, *targets):
    return from_grad(lambda *inputs: checkpoint(loss_of, *inputs, use_reentrant=False), logits, *targets)


def from_pack_hooks(loss_of, logits, *targets):
    kept = []

    def pack(tensor):
        kept.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(logits, *targets)
    gradient = torch.autograd.grad(loss * 2, logits, retain_graph=True)[0]
    torch.autograd.grad(loss, logits, retain_graph=True)[0].zero_()
    assert all(torch.equal(tensor, before) for tensor, before in kept)
    return loss, logits, gradient


SOURCES = [
    from_grad,
    from_leaf,
    from_hook,
    from_prehook,
    from_retain_grad,
    from_thread,
    from_checkpoint,
    from_pack_hooks,
]


def resized(gradient):
    storage = gradient.untyped_storage()
    storage.resize_(2 * storage.nbytes())
    return gradient


def storage_alone(gradient):
    return torch.empty(0).set_(gradient.untyped_storage(), 0, gradient.shape)


KEEPERS = {
    "tensor": lambda gradient: gradient,
    "view": lambda gradient: gradient[2:5].t(),
    "detached": lambda gradient: gradient.detach(),
    "subclass": lambda gradient: gradient.as_subclass(Subclass),
    "array": lambda gradient: torch.from_numpy(gradient.numpy()),
    "dlpack": torch.from_dlpack,
    "storage": storage_alone,
    "shared memory": lambda gradient: gradient.share_memory_(),
    "resized storage": resized,
}


def gradients_of(loss_of, source, keep, shape):
    """The kept gradient, and every other one that follows; asserts that the kept one does not change."""
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(shape, generator=generator).requires_grad_()
    targets = torch.randn(shape, generator=generator), torch.randint(0, shape[1], shape[:1], generator=generator)
    loss, logits, gradient = source(loss_of, leaf * 1.0, *targets)
    kept = keep(gradient)
    del gradient
    before = torch.Tensor(kept).clone()
    others = []
    for scale in (3, 0, 1):
        others.append(torch.autograd.grad(scale * loss, logits, retain_graph=True)[0])
        assert torch.equal(torch.Tensor(kept), before)
    for _ in range(2):  # the next training steps
        others.append(torch.autograd.grad(loss_of(leaf * 2.0, *targets), leaf)[0])
        assert torch.equal(torch.Tensor(kept), before)
    for tensor in (kept, *others[:3]):
        copied = tensor.clone()
        tensor.zero_()  # the gradients of others do not change
        others.append(copied)
    others.append(torch.autograd.grad(loss, logits, retain_graph=True)[0])
    others.append(torch.autograd.grad(5 * loss, logits)[0])
    return [before, *others]


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS.keys())
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__.removeprefix("from_"))
def test_a_gradient_is_never_written_again(source, keep):
    shape = (64, 300)  # large enough for every kind of allocation
    torch.testing.assert_close(gradients_of(ours, source, keep, shape), gradients_of(eager, source, keep, shape))


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copied_gradient_is_independent(copy_of):
    leaf, targets = torch.randn(8, 5, requires_grad=True), (torch.randn(8, 5), torch.arange(8) % 5)
    loss = ours(leaf, *targets)
    gradient = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    copied, before = copy_of(gradient), gradient.clone()
    gradient.zero_()
    assert torch.equal(copied, before)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], before)


def test_activations_have_their_own_gradients():
    activation = torch.randn(6, 4, requires_grad=True)
    logits = torch.randn(6, 3, requires_grad=True)
    loss = kddp_ext.fused_kd_l1_loss(logits, None, torch.arange(6) % 3, [activation] * 2, alpha=0.0, l1_weight=0.3)
    first = torch.autograd.grad(loss, activation, retain_graph=True)[0]
    before = first.clone()
    second = torch.autograd.grad(2 * loss, activation, retain_graph=True)[0]
    first.zero_()
    third = torch.autograd.grad(loss, activation)[0]
    torch.testing.assert_close(second, 2 * before)
    torch.testing.assert_close(third, before)


def test_a_freed_graph_says_so():
    logits = torch.randn(8, 5, requires_grad=True)
    loss = ours(logits, torch.randn(8, 5), torch.arange(8) % 5)
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
