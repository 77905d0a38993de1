"""Exports a student to ONNX and classifies with ONNX Runtime, which needs neither PyTorch nor kddp_ext.

    python quickstart.py && python shrink.py && python onnx_inference.py

The student is the one that shrink.py saved.
"""

import onnxruntime
from quickstart import NeuralNetwork, load_data, test
from torch.utils.data import DataLoader, default_collate

import kddp_ext

_, test_data = load_data()
images, labels = default_collate(list(test_data))
student = kddp_ext.load_student("student.safetensors", NeuralNetwork, (images[:2],))
test(DataLoader(test_data, batch_size=64), student)
kddp_ext.export_onnx(student, "student.onnx", (images[:2],))

session = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
print(f"Accuracy: {100 * (logits.argmax(1) == labels.numpy()).mean():.1f}%")
