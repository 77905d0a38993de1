"""The Lightning callback in a real Trainer: training continues with a smaller student, and resumes exactly."""

import pytest
import torch
from pruner_cases import assert_narrows_every, assert_same_state
from torch import nn

import kddp_ext

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
from kddp_ext.integrations.lightning import DynamicPruning  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

CLASSES, PIXELS = 10, 64


def make_student():
    hidden = nn.Linear(PIXELS, 24), nn.BatchNorm1d(24), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES))


class Distillation(lightning.LightningModule):
    """A student inside the module, and a teacher that no optimizer holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = make_student()
        self.teacher = nn.Linear(PIXELS, CLASSES).requires_grad_(False)
        self.widths_seen = []
        self.loaded = 0

    def forward(self, images):
        return self.student(images)

    def training_step(self, batch, index):
        images, labels = batch
        logits = self.student(images)
        self.widths_seen.append(self.student[0].out_features)
        return kddp_ext.fused_kd_l1_loss(logits, self.teacher(images), labels, self.pruner.activations, l1_weight=1e-3)

    def validation_step(self, batch, index):
        self.student(batch[0])

    def on_load_checkpoint(self, checkpoint):
        self.loaded += 1

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=1e-2)


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16 * count, PIXELS, generator=generator)
    labels = torch.randint(CLASSES, (16 * count,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)


def make_pruning(**settings):
    defaults = {"student": "student", "threshold": 0.75, "patience": 2}
    return DynamicPruning(example_inputs=(torch.zeros(2, PIXELS),), **{**defaults, **settings})


def make_trainer(epochs, *callbacks, **settings):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    settings = {"accelerator": "cpu", "devices": 1, **quiet, **settings}
    return lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), **settings)


def saving(folder):
    return lightning.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")


def public_attributes(module):
    return {name for name in vars(module) if not name.startswith("_")}


def test_training_continues_with_a_smaller_student():
    module, pruning = Distillation(), make_pruning()
    attributes = public_attributes(module)
    trainer = make_trainer(4, pruning)
    trainer.fit(module, batches(), batches(1))
    assert module.widths_seen[0] == 24  # at the first check, no neuron has reached the patience
    assert module.widths_seen[-1] < 24
    assert pruning.pruner.widths == {"0": module.student[0].out_features, "3": module.student[3].out_features}
    assert trainer.callback_metrics["width/0"] == module.student[0].out_features
    assert trainer.callback_metrics["parameters"] == sum(p.numel() for p in module.student.parameters())
    assert pruning.report.parameters_after == trainer.callback_metrics["parameters"]
    for parameter in module.student.parameters():
        assert trainer.optimizers[0].state[parameter]["exp_avg"].shape == parameter.shape
    assert public_attributes(module) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_the_modules_own_attributes_are_restored():
    """A module may declare `pruner` for its type checker, and may get a hook from outside."""
    module, heard = Distillation(), []
    module.pruner, module.on_load_checkpoint = None, heard.append
    module.other = make_student()
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters())
    two = make_pruning(student="other", every_n_epochs=2), make_pruning()
    make_trainer(1, *two).fit(module, batches())
    assert module.pruner is None
    assert module.on_load_checkpoint == heard.append
    module.on_load_checkpoint({})
    assert heard == [{}]


def test_every_other_epoch_prunes():
    module, pruning = Distillation(), make_pruning(patience=1, every_n_epochs=2)
    make_trainer(5, pruning).fit(module, batches())
    widths = module.widths_seen[::4]
    assert widths[0] == widths[1] > widths[2] == widths[3]
    assert len(pruning.pruner.history.steps) == 2


@pytest.mark.parametrize("accumulated", [1, 2])
def test_steps_of_the_optimizer_count(accumulated):
    module = Distillation()
    pruning = make_pruning(patience=1, every_n_epochs=None, interval=3, l1_weight=0.1, l1_warmup=12)
    make_trainer(3, pruning, accumulate_grad_batches=accumulated).fit(module, batches())
    assert pruning.pruner.l1_weight == pytest.approx(0.1 / accumulated)
    assert_narrows_every(3 * accumulated, module.widths_seen)


def test_the_module_itself_may_be_the_student():
    module, pruning = Distillation(), make_pruning(student=None, patience=1)
    make_trainer(2, pruning).fit(module, batches())
    first, second = (module.student[index].out_features for index in (0, 3))
    assert pruning.pruner.widths == {"student.0": first, "student.3": second}
    assert first < 24


@pytest.mark.parametrize(("stopped_after", "validated"), [(1, False), (2, False), (3, False), (2, True)])
def test_resumed_training_equals_the_uninterrupted(tmp_path, stopped_after, validated):
    validation = batches(1) if validated else None
    whole, pruning = Distillation(), make_pruning()
    uninterrupted = make_trainer(4, pruning, saving(tmp_path), enable_checkpointing=True)
    uninterrupted.fit(whole, batches(), validation)

    resumed, pruning_again = Distillation(), make_pruning()
    trainer = make_trainer(4, pruning_again, saving(tmp_path), enable_checkpointing=True)
    trainer.fit(resumed, batches(), validation, ckpt_path=tmp_path / f"epoch={stopped_after - 1}.ckpt")
    assert resumed.loaded == 1  # the module's own hook is called too
    assert len(resumed.widths_seen) == 4 * (4 - stopped_after)
    assert pruning_again.pruner.history == pruning.pruner.history
    assert len(pruning.pruner.history.steps) > 1
    assert_same_state(whole.state_dict(), resumed.state_dict())
    assert_same_state(uninterrupted.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())
    assert_same_state(pruning.state_dict(), pruning_again.state_dict())


def test_a_checkpoint_for_validation_and_by_hand(tmp_path):
    module, pruning = Distillation(), make_pruning()
    make_trainer(3, pruning, saving(tmp_path), enable_checkpointing=True).fit(module, batches())
    path = tmp_path / "epoch=2.ckpt"

    fresh = Distillation()
    validating = make_trainer(1, make_pruning(), saving(tmp_path), enable_checkpointing=True)
    validating.validate(fresh, batches(1), ckpt_path=path, verbose=False)
    assert_same_state(module.state_dict(), fresh.state_dict())
    assert "on_load_checkpoint" not in vars(fresh)

    fresh, checkpoint = Distillation(), torch.load(path, weights_only=True)
    make_pruning().rebuild(fresh, checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert_same_state(module.state_dict(), fresh.state_dict())


def test_a_second_training_continues_the_first():
    module, pruning = Distillation(), make_pruning(patience=1)
    make_trainer(2, pruning).fit(module, batches())
    first = pruning.pruner.history.copy()
    make_trainer(2, pruning).fit(module, batches())
    assert pruning.pruner.history.original_widths == {"0": 24, "3": 16}
    assert pruning.pruner.history.steps[: len(first.steps)] == first.steps


def test_a_strategy_that_spawns_is_refused():
    trainer = make_trainer(1, strategy="ddp_spawn")
    trainer.strategy._configure_launcher()
    with pytest.raises(ValueError, match=r"trainer: strategies that spawn or fork .* use strategy='ddp'"):
        make_pruning().on_fit_start(trainer, Distillation())


def test_arguments():
    with pytest.raises(ValueError, match="every_n_epochs: expected at least 1, got 0"):
        make_pruning(every_n_epochs=0)
    with pytest.raises(ValueError, match="interval: it counts steps; pass every_n_epochs=None with it"):
        make_pruning(interval=5)
    with pytest.raises(ValueError, match="student: Distillation has no module named 'pupil'"):
        make_trainer(1, make_pruning(student="pupil")).fit(Distillation(), batches())
    module = Distillation()
    with pytest.raises(ValueError, match="threshold: expected more than 0"):
        make_trainer(1, make_pruning(threshold=0)).fit(module, batches())
    assert not {"pruner", "on_load_checkpoint"} & vars(module).keys()  # an error leaves none

    class ForTheTeacher(Distillation):
        def configure_optimizers(self):
            return torch.optim.SGD(self.teacher.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="trainer: none of its optimizers holds a parameter of the student"):
        make_trainer(1, make_pruning()).fit(ForTheTeacher(), batches())


class TwoOptimizers(Distillation):
    automatic_optimization = False

    def training_step(self, batch, index):
        self.manual_backward(super().training_step(batch, index))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.student[:3], self.student[3:])]


def test_several_optimizers():
    module, pruning = TwoOptimizers(), make_pruning(patience=1, interval=4, every_n_epochs=None)
    trainer = make_trainer(2, pruning)
    trainer.fit(module, batches())
    assert module.widths_seen == [24] * 4 + [module.widths_seen[-1]] * 4
    assert module.widths_seen[-1] < 24
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            assert state["exp_avg"].shape == parameter.shape
