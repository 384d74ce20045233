"""What can be said of the Triton kernels where there is no GPU: right in Triton's interpreter, and they compile.

The interpreter runs a kernel's Python line by line on CPU tensors; it does not notice what the compiler refuses, such
as a variable that changes its type in a loop. So both are tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

HERE = Path(__file__).parent


def test_kernels_are_right_in_the_interpreter() -> None:
    """In a process of its own: TRITON_INTERPRET is read when Triton is imported, and changes it for good."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "test_triton.py")],
        cwd=HERE.parents[1],
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and "passed" in found.stdout, found.stdout[-8000:] + found.stderr[-2000:]


def test_importing_the_choice_of_kernels_does_not_import_triton() -> None:
    code = "import sys, dictionary_learning.kernels; assert not any(name.startswith('triton') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], check=True)


class Compiled:
    """Stands in for a kernel: compiles it for an H100 with the arguments it would be launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.assembly = kernel, ""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: Any, num_warps: int) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        types = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        types |= {torch.int64: "i64", torch.int32: "i32"}
        for i, (parameter, value) in enumerate(zip(self.kernel.params, args, strict=True)):
            # As Triton's launcher does: 1 is a constant, and what is a multiple of 16 is known to be.
            if parameter.is_constexpr or (not parameter.do_not_specialize and isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(i,)] = "constexpr", value
                continue
            signature[parameter.name] = f"*{types[value.dtype]}" if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or (not parameter.do_not_specialize and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        assert found.asm["cubin"]
        self.assembly = found.asm["ptx"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes the compiler's place")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("D", "dtype"), [(1, torch.float32), (7, torch.float32), (768, torch.bfloat16), (768, torch.float64)]
)
def test_kernels_compile_for_an_h100(
    D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dictionary_learning.kernels import Entries, triton_adam, triton_top_k
    from dictionary_learning.kernels import triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = {}
    for module, names in (
        (kernels, ("_dots", "_window_sums", "_add_up")),
        (triton_adam, ("_squares", "_adam")),
        (triton_top_k, ("_largest",)),
    ):
        for name in names:
            compiled[name] = Compiled(getattr(module, name))
            monkeypatch.setattr(module, name, compiled[name])

    F, k = 40, 3
    entries = Entries.of_rows(torch.zeros(kernels.WINDOW, k, dtype=torch.int64), F)
    values, rows, W = torch.ones(3 * kernels.WINDOW), torch.ones(kernels.WINDOW, D).to(dtype), torch.ones(F, D)
    kernels.bags(values, entries, W.to(dtype))
    kernels.dots(rows, entries, W)
    kernels.weight_gradient(values, entries, rows)
    kernels.latent_sums(values.to(dtype), entries)
    one, master = torch.ones(()), W.double() if dtype == torch.float64 else W
    triton_adam.gradient_squares(master, W.to(dtype), True)
    triton_adam.adam_step(
        master, W.to(dtype), master.clone(), master.clone(), step=one, lr=0.1, scale=one, project=True
    )  # fmt: skip
    triton_top_k._chosen(torch.ones(2, max(1, 21 * (D // 7))).to(dtype), 1)
    assert all(kernel.assembly for kernel in compiled.values())
    # Bias corrections in float64 (an exponential has a fused multiply-add in it), sums in the accumulation type.
    assert "fma.rn.f64" in compiled["_adam"].assembly
    assert ("f64" in compiled["_dots"].assembly) == (dtype == torch.float64)
