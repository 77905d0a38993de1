"""The Transformers callback in a real Trainer: training continues with a smaller student, and resumes exactly."""

from types import SimpleNamespace

import pytest
import torch
from pruner_cases import assert_narrows_every, assert_same_state, observed_pruner
from torch import nn

import kddp_ext

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("accelerate", reason="Accelerate is not installed, which the Trainer of Transformers needs")
from kddp_ext.integrations.transformers import DynamicPruning  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]

CLASSES, PIXELS = 10, 64


class Student(nn.Module):
    """A model for a Trainer: keywords in, a dictionary out."""

    def __init__(self, width=24):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(PIXELS, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 16), nn.ReLU()
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, pixels, labels=None):
        return {"logits": self.head(self.body(pixels))}


class DistillationTrainer(transformers.Trainer):
    """The Trainer of docs/integrations.md."""

    def __init__(self, *args, teacher, pruning, **kwargs):
        super().__init__(*args, callbacks=[pruning], **kwargs)
        self.teacher, self.pruning = teacher.eval(), pruning
        self.model_accepts_loss_kwargs = False  # the loss is a mean: gradient accumulation divides it
        self.widths_seen = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(inputs["pixels"])
        activations = self.pruning.pruner.activations if model.training else ()
        loss = kddp_ext.fused_kd_l1_loss(outputs["logits"], teacher_logits, labels, activations, l1_weight=1e-3)
        if model.training:
            self.widths_seen.append(activations[0].shape[1])
        return (loss, outputs) if return_outputs else loss


def samples(count=64):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, PIXELS, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [{"pixels": pixel, "labels": label} for pixel, label in zip(pixels, labels, strict=True)]


def make_pruning(**settings):
    return DynamicPruning(**{"example_inputs": (torch.zeros(2, PIXELS),), "threshold": 0.75, **settings})


def make_trainer(folder, pruning, student=None, **arguments):
    defaults = {
        "num_train_epochs": 4, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "save_strategy": "epoch",
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return DistillationTrainer(
        Student() if student is None else student,
        transformers.TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=samples(),
        eval_dataset=samples(16),
        teacher=nn.Linear(PIXELS, CLASSES),
        pruning=pruning,
    )


def test_training_continues_with_a_smaller_student(tmp_path):
    pruning = make_pruning()
    trainer = make_trainer(tmp_path, pruning, save_strategy="no")
    trainer.evaluate()  # there is no pruner yet
    trainer.train()
    student = trainer.model
    assert trainer.widths_seen[0] == 24
    assert trainer.widths_seen[-1] < 24
    assert pruning.pruner.widths == {"body.0": student.body[0].out_features, "body.4": student.body[4].out_features}
    logged = [entry for entry in trainer.state.log_history if "parameters" in entry]
    assert [entry["epoch"] for entry in logged] == [1, 2, 3, 4]
    assert logged[-1]["width/body.0"] == student.body[0].out_features
    assert logged[-1]["parameters"] == sum(p.numel() for p in student.parameters()) < logged[0]["parameters"]
    for parameter in student.parameters():
        assert trainer.optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("accumulated", [1, 2])
def test_steps_of_the_optimizer_count(tmp_path, accumulated):
    pruning = make_pruning(patience=1, every_n_epochs=None, interval=3, l1_weight=0.1, l1_warmup=12)
    trainer = make_trainer(
        tmp_path, pruning, save_strategy="no", num_train_epochs=3, gradient_accumulation_steps=accumulated
    )
    trainer.train()
    assert pruning.pruner.l1_weight == pytest.approx(0.1 / accumulated)
    assert_narrows_every(3 * accumulated, trainer.widths_seen)


def test_an_epoch_that_is_cut_short_does_not_count(tmp_path):
    pruning = make_pruning(patience=1)
    make_trainer(tmp_path, pruning, save_strategy="no", max_steps=3).train()
    assert pruning.report is None
    make_trainer(tmp_path, pruning := make_pruning(patience=1), save_strategy="no", max_steps=4).train()
    assert pruning.report.neurons_pruned > 0


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_resumed_training_equals_the_uninterrupted(tmp_path, stopped_after):
    example = {"example_inputs": (), "example_kwargs": {"pixels": torch.zeros(2, PIXELS)}}
    pruning = make_pruning(**example)
    uninterrupted = make_trainer(tmp_path, pruning)
    uninterrupted.train()

    folder = str(tmp_path / f"checkpoint-{4 * stopped_after}")
    again = make_pruning(**example)
    resumed = make_trainer(tmp_path / "again", again, resume_from_checkpoint=folder)
    resumed.train(resume_from_checkpoint=resumed.args.resume_from_checkpoint)
    assert len(resumed.widths_seen) == 16 - 4 * stopped_after
    assert again.pruner.history == pruning.pruner.history
    assert len(pruning.pruner.history.steps) > 1
    assert_same_state(uninterrupted.model.state_dict(), resumed.model.state_dict())
    for one, other in zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True):
        assert_same_state(uninterrupted.optimizer.state[one], resumed.optimizer.state[other])


def test_weights_do_not_fit_without_the_history(tmp_path):
    make_trainer(tmp_path, make_pruning()).train()
    folder = str(tmp_path / "checkpoint-16")
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_trainer(tmp_path, make_pruning()).train(resume_from_checkpoint=folder)
    (tmp_path / "checkpoint-16" / "pruning.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"pruning\.pt"):
        make_trainer(tmp_path, make_pruning(), resume_from_checkpoint=folder)


def test_several_gpus_in_one_process_are_refused():
    with pytest.raises(ValueError, match="args: expected one GPU for each process, got 2; launch one process per GPU"):
        make_pruning().on_train_begin(SimpleNamespace(n_gpu=2), None, None, model=Student(), optimizer=None)


def test_the_best_model_at_the_end_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_pruning(), load_best_model_at_end=True, eval_strategy="epoch")
    with pytest.raises(ValueError, match="args: load_best_model_at_end would load a wider model's weights"):
        trainer.train()


TOKENS = torch.arange(14).reshape(2, 7)


def small(name, **settings):
    return lambda: getattr(transformers, name)(getattr(transformers, name.split("For")[0] + "Config")(**settings))


# A constructor, example inputs, the widths with streams="exact", and the residual stream that needs "all", if one does.
MODELS = {
    "BERT": (
        small(
            "BertForSequenceClassification", vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32,
        ),
        TOKENS,
        {
            "bert.encoder.layer.0.attention.self.query": 2,
            "bert.encoder.layer.0.intermediate.dense": 32,
            "bert.pooler.dense": 16,
        },
        "bert.embeddings.word_embeddings",
    ),
    "DistilBERT": (
        small("DistilBertForSequenceClassification", vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32),
        TOKENS,
        {
            "distilbert.transformer.layer.0.attention.q_lin": 2,
            "distilbert.transformer.layer.0.ffn.lin1": 32,
            "pre_classifier": 16,
        },
        "distilbert.embeddings.word_embeddings",
    ),
    "ViT": (
        small(
            "ViTForImageClassification", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, image_size=8, patch_size=4, num_channels=1,
        ),
        torch.randn(2, 1, 8, 8),
        {"vit.layers.0.attention.q_proj": 2, "vit.layers.0.mlp.fc1": 32},
        "vit.embeddings.patch_embeddings.projection",
    ),
    "Llama with a cache": (
        small(
            "LlamaForCausalLM", vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32,
        ),
        TOKENS,
        {"model.embed_tokens": 16, "model.layers.0.self_attn.q_proj": 2, "model.layers.0.mlp.gate_proj": 32},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_mlps_are_pruned_and_the_residual_stream_where_it_is_asked_for(name):
    make, inputs, widths, stream = MODELS[name]
    for streams, expected in (("exact", widths), ("all", {stream: 16, **widths} if stream else widths)):
        torch.manual_seed(0)
        model = make()
        options = {"criterion": "mean_activation", "threshold": 1.0, "patience": 1, "maximum_share": 0.5}
        pruner = observed_pruner(model, inputs, streams=streams, **options)
        assert pruner.widths == expected
        assert ("streams='all'" in pruner.refused.get(stream, "")) == (stream is not None and streams == "exact")
        logits = model(inputs).logits
        pruner.prune()
        assert pruner.widths == {layer: width // 2 for layer, width in expected.items()}
        assert model(inputs).logits.shape == logits.shape
