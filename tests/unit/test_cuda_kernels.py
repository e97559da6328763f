"""The CUDA attention path: what holds on any device, and the harness in small.

On a machine with a card the same tests run the flash kernels.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.attention_kernels import KERNELS, Pages, borders_of, random_qkv, shapes, variants
from benchmarks.cuda_kernels import check_float64, check_serving, main, relative_error
from vllm_graft.attention import cuda
from vllm_graft.attention.kernels import AttentionSpec, attend, sdpa_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = KERNELS["torch" if DEVICE == "cuda" else "sdpa"][0]
LENGTHS = [1, 5, 17]
SHAPES = [shape for shape in variants(shapes(small=True)) if KERNEL.takes(shape)]


def failed(records: list[dict[str, object]]) -> list[dict[str, object]]:
    return [r for r in records if not r["ok"]]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_forward_and_gradients_agree_with_float64(shape):
    assert not failed(check_float64(KERNEL, shape, DEVICE, LENGTHS, torch.bfloat16))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.causal], ids=lambda s: s.name)
def test_serving_from_pages_agrees_with_packed_training(shape):
    assert not failed(check_serving(KERNEL, shape, DEVICE, LENGTHS))


def test_float32_and_other_devices_fall_back_to_sdpa():
    q, k, v = random_qkv(shapes(small=True)[1], 23, DEVICE, torch.float32)
    spec = AttentionSpec(scale=0.2)
    borders = borders_of([9, 14])
    got = cuda.cuda_attention(q, k, v, borders, spec)
    assert torch.equal(got, sdpa_packed(q, k, v, borders, spec))


@pytest.mark.parametrize("head_dim, fits", [(128, True), (192, True), (100, False), (264, False)])
def test_head_dims_of_the_flash_kernel(head_dim, fits, monkeypatch):
    monkeypatch.setattr(cuda.torch.cuda, "get_device_capability", lambda device: (9, 0))
    q = FakeTensor(head_dim, torch.bfloat16)
    assert cuda.flash_supports(q, q) is fits
    assert not cuda.flash_supports(FakeTensor(head_dim, torch.float32), q)


class FakeTensor:
    """Just enough of a CUDA tensor for `flash_supports`."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (1, 1, head_dim), dtype


@pytest.mark.parametrize(
    "spec, window",
    [
        (AttentionSpec(scale=1.0), (-1, 0)),
        (AttentionSpec(scale=1.0, causal=False), (-1, -1)),
        (AttentionSpec(scale=1.0, sliding_window=100), (99, 0)),
        (AttentionSpec(scale=1.0, sliding_window=100, causal=False), (99, 99)),
    ],
)
def test_window_leaves_out_the_query_itself(spec, window):
    assert cuda.window_of(spec) == window


NEWEST = {"scale", "window_size", "enable_gqa", "num_splits", "block_table", "seqused_k"}


@pytest.mark.parametrize("known", [{"scale", "window_size"}, NEWEST], ids=["torch 2.11", "newest"])
def test_varlen_call_fixes_the_split_and_pads_narrow_values(known, monkeypatch):
    seen = {}

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        seen.update(options, max_q=max_q, v=v)
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(cuda, "varlen_parameters", lambda: frozenset(known))
    q, k, v = torch.randn(3, 4, 24), torch.randn(3, 2, 24), torch.randn(3, 2, 16)
    borders = borders_of([1, 1, 1])
    out = cuda.varlen_packed(q, k, v, borders, AttentionSpec(scale=0.3))
    assert torch.equal(out, v.repeat_interleave(2, dim=1)), "padding is cut off again"
    assert seen["v"].shape == (3, 2, 24)
    # With one query per sample FlashAttention 2 would choose splits from the batch.
    assert seen["max_q"] == 2
    assert seen.get("num_splits") == (1 if "num_splits" in known else None)
    assert seen.get("enable_gqa") == (True if "enable_gqa" in known else None)


def test_this_torch_takes_what_the_call_always_passes():
    assert {"scale", "window_size"} <= cuda.varlen_parameters()


def test_pages_give_back_what_they_hold():
    k, v = torch.randn(2, 22, 2, 8).unbind()
    pages = Pages.of(k, v, [5, 17], page_size=4, fill=torch.nan)
    got_k, got_v = pages.gather([5, 17])
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)
    shorter, _ = pages.gather([3, 17])
    assert torch.equal(shorter, torch.cat([k[:3], k[5:]]))


def test_error_counts_per_sample_and_nan_fails():
    ref = torch.ones(10, 1, dtype=torch.float64)
    out = ref.clone()
    out[0] = 1.1
    assert relative_error(out, ref, [1, 9]) == pytest.approx(0.1)
    out[0] = torch.nan
    assert not relative_error(out, ref, [1, 9]) <= 1e9


def test_harness_runs_and_reports(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["--device", DEVICE, "--checks-only", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["checks"]
    assert all(r["ok"] for r in report["checks"])
    assert "0 failed" in capsys.readouterr().out


def test_harness_fails_on_a_wrong_kernel(tmp_path, monkeypatch):
    def wrong(q, k, v, borders, spec):
        return attend(q, k, v, borders, spec) * 1.01

    monkeypatch.setattr("benchmarks.attention_kernels.sdpa_packed", wrong)
    monkeypatch.setattr("benchmarks.cuda_kernels.sdpa_packed", wrong)
    path = tmp_path / "report.json"
    assert main(["--device", DEVICE, "--checks-only", "--json", str(path)]) == 1


def test_importing_touches_no_cuda_state():
    code = "import torch, vllm_graft.attention.cuda; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
