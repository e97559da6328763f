"""What importing Graft costs, and the module names it serves inside vLLM."""

from __future__ import annotations

import pytest

import vllm_graft
from tests.support import python
from vllm_graft import _bootstrap

SPEC_NAMES = [
    "VLLMModelForCausalLM",
    "TrainableFlashAttention",
    "TrainableMLA",
    "MLAConfig",
    "replace_with_trainable_attention",
    "load_external_weights",
    "convert_freqs_cis_to_real",
    "store_positions_in_context",
    "create_mla_kv_cache_spec",
    "ParallelContext",
]


def test_importing_the_package_loads_neither_torch_nor_vllm():
    done = python(
        "import sys, vllm_graft; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_resolves_without_vllm():
    """All but the classes derived from vLLM's engines."""
    code = (
        "import sys, vllm_graft\n"
        "engines = {'TrainableLLM', 'TrainableAsyncLLM'}\n"
        "for name in set(vllm_graft.__all__) - engines: getattr(vllm_graft, name)\n"
        "print('vllm' in sys.modules, 'torchtitan' in sys.modules)"
    )
    assert python(code).stdout.strip() == "False False"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vllm_graft.nonsense


def test_importing_the_example_is_light_and_initializes_no_cuda():
    code = (
        "import sys, examples.custom_models.qwen3_torchtitan, torch\n"
        "print([m for m in ('torchtitan', 'vllm') if m in sys.modules],"
        " torch.cuda.is_initialized())"
    )
    assert python(code).stdout.strip() == "[] False"


@pytest.mark.parametrize(
    "setting", [{}, {"VLLM_TARGET_DEVICE": "cpu"}, {"VLLM_PLUGINS": "none_of_ours"}]
)
def test_the_api_path_gives_the_same_objects_in_a_fresh_interpreter(setting):
    code = (
        f"from vllm.model_executor.custom_models import {', '.join(SPEC_NAMES)}\n"
        "import vllm_graft\n"
        f"print(all(getattr(vllm_graft, n) is globals()[n] for n in {SPEC_NAMES}))"
    )
    done = python(code, **setting)
    assert done.stdout.strip().endswith("True"), done.stderr


def test_the_old_path_says_where_the_class_went():
    done = python("from vllm.model_executor.layers.trainable_attention import X")
    assert "ImportError" in done.stderr
    assert "from vllm.model_executor.custom_models import TrainableFlashAttention" in done.stderr


def test_the_api_module_lists_its_names_and_refuses_others():
    from vllm.model_executor import custom_models

    assert custom_models.__all__ == SPEC_NAMES
    with pytest.raises(ImportError, match="CoreAttention"):
        from vllm.model_executor.custom_models import CoreAttention  # noqa: F401


def test_the_hook_is_installed_once_and_at_startup():
    import sys

    _bootstrap.install("again")
    assert sum(type(f) is _bootstrap._Finder for f in sys.meta_path) == 1
    assert _bootstrap.installed_at_startup()
