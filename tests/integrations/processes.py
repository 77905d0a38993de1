"""Run by two processes for test_processes: a library trains and prunes, and both end with the same student."""

import os
import sys
import tempfile
import warnings

import torch
import torch.distributed
from torch import nn

import kddp_ext


def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


def samples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 12, generator=generator), torch.randint(3, (32,), generator=generator)


def report(model, pruner):
    """Print the width, the number of prunes, and whether both processes have the same weights."""
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    others = [torch.zeros_like(weights) for _ in range(2)]
    torch.distributed.all_gather(others, weights)
    # One write, because the other process writes too.
    os.write(1, f"\nRESULT {pruner.widths['0']} {len(pruner.history.steps)} {torch.equal(*others)}\n".encode())


def with_lightning():
    import lightning.pytorch as lightning

    from kddp_ext.integrations.lightning import DynamicPruning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.student = student()

        def training_step(self, batch, index):
            return kddp_ext.fused_kd_l1_loss(self.student(batch[0]), None, batch[1], self.pruner.activations, alpha=0.0)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

        def on_train_end(self):
            report(self.student, self.pruner)

    pruning = DynamicPruning(student="student", example_inputs=(torch.zeros(2, 12),), threshold=0.6, patience=1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), batch_size=8)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", callbacks=[pruning], **quiet
    )
    trainer.fit(Module(), loader)


def with_transformers():
    from transformers import Trainer, TrainingArguments

    from kddp_ext.integrations.transformers import DynamicPruning

    class Classifier(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(inputs["input"])
            return kddp_ext.fused_kd_l1_loss(logits, None, inputs["labels"], pruning.pruner.activations, alpha=0.0)

    pruning = DynamicPruning(example_inputs=(torch.zeros(2, 12),), threshold=0.6, patience=1)
    arguments = TrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=2, save_strategy="no", use_cpu=True, ddp_backend="gloo", report_to=[],
        disable_tqdm=True, learning_rate=1e-2, remove_unused_columns=False,
    )  # fmt: skip
    data = [{"input": image, "labels": label} for image, label in zip(*samples(), strict=True)]
    model = student()
    trainer = Classifier(model, arguments, train_dataset=data, callbacks=[pruning])
    trainer.train()
    report(model, pruning.pruner)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"lightning": with_lightning, "transformers": with_transformers}[sys.argv[1]]()
    torch.distributed.barrier()  # the launcher would end the other process
    torch.distributed.destroy_process_group()
