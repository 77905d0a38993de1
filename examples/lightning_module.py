"""Distils and prunes a student with a LightningModule and the callback DynamicPruning.

    python quickstart.py && python lightning_module.py

The teacher is the model that quickstart.py saved.
"""

import lightning
import torch
from quickstart import NeuralNetwork, load_data, test
from torch.utils.data import DataLoader

import kddp_ext
from kddp_ext.integrations.lightning import DynamicPruning


class Distillation(lightning.LightningModule):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)

    def training_step(self, batch, index):
        images, labels = batch
        logits = self.student(images)
        return kddp_ext.fused_kd_l1_loss(logits, self.teacher(images), labels, self.pruner.activations, l1_weight=0.03)

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=1e-3)


torch.manual_seed(0)
training_data, test_data = load_data()
teacher, student = NeuralNetwork(), NeuralNetwork()
teacher.load_state_dict(torch.load("model.pth", weights_only=True))
test(DataLoader(test_data, batch_size=64), teacher)

pruning = DynamicPruning(student="student", example_inputs=(training_data[0][0][None],))
trainer = lightning.Trainer(
    max_epochs=10, accelerator="cpu", callbacks=[pruning], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Distillation(student, teacher), DataLoader(training_data, batch_size=64, shuffle=True))
print(pruning.pruner.history)
test(DataLoader(test_data, batch_size=64), student)
