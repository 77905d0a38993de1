"""The native CPU module (python_bindings/core.cpp). Addresses are integers; 0 stands for an absent tensor."""

from collections.abc import Callable

from torch import Tensor

_Matrix = tuple[int, int, int]  # data, element type, row stride
# activation, rows, neurons, samples, l1_weight, gradient, statistics
_Layer = tuple[_Matrix, int, int, float, float, int, int]
_Block = tuple[int, int, int, int]  # source, row stride in bytes, bytes of a column, target
_Compensation = tuple[int, int, int, int, int]  # element type, pruned columns, their number, means, shift

compiler: str

def instruction_set() -> str: ...
def kd_l1_loss(
    rows: int,
    classes: int,
    student: _Matrix,
    teacher: _Matrix,
    labels: int,
    row_weights: int,
    layers: list[_Layer],
    statistics_stride: int,
    temperature: float,
    alpha: float,
    normalizer: float,
    label_smoothing: float,
    ignore_index: int,
    divergence: int,
    mixture_share: float,
    teacher_weight: float,
    student_weight: float,
    dkd_target_weight: float,
    dkd_non_target_weight: float,
    standardize_logits: bool,
    scaled_gradients: bool,
    logits_gradient: int,
    result_type: int,
    loss: int,
    terms: int,
    row_terms: int,
    allocate: Callable[[int], Tensor],
    threads: int,
) -> None: ...
def gather_slices(
    blocks: list[_Block],
    columns: int,
    keep_rows: int,
    kept_rows: int,
    keep_columns: int,
    kept_columns: int,
    compensation: _Compensation,
    threads: int,
) -> None: ...
def gradient_products(
    activation: int,
    gradient: int,
    element_type: int,
    mean: int,
    products: int,
    samples: int,
    before: int,
    entries: int,
    after: int,
    threads: int,
) -> None: ...
