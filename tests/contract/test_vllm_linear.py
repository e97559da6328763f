"""What `serve/_vllm_linear.py` uses of vLLM: its linear layer, quantization methods, LoRA names."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

from vllm_graft.serve import _vllm_linear
from vllm_graft.serve.adapter import GraftForCausalLM


def test_the_linear_layer_takes_what_it_is_built_with_and_has_the_names_of_nn_linear():
    from vllm.model_executor.layers.linear import ReplicatedLinear

    wanted = {"input_size", "output_size", "bias", "params_dtype", "quant_config", "prefix"}
    assert wanted | {"return_bias"} <= inspect.signature(ReplicatedLinear).parameters.keys()
    source = inspect.getsource(ReplicatedLinear)
    assert "self.quant_method.create_weights(" in source
    assert "self.bias = Parameter(" in source


def test_lora_still_wraps_every_layer_derived_from_the_linear_layer():
    from vllm.lora.layers import ReplicatedLinearWithLoRA

    source = inspect.getsource(ReplicatedLinearWithLoRA)
    assert "isinstance(source_layer, maybe_get_oot_by_class(ReplicatedLinear))" in source
    # By calling the layer, so that what `GraftLinear.forward` does stays.
    assert "self._apply_base_forward(x)" in source


def test_vllm_knows_the_adapter_as_a_model_for_lora():
    from vllm.model_executor.models import supports_lora
    from vllm.model_executor.models.interfaces import SupportsLoRA

    assert supports_lora(GraftForCausalLM)
    wanted = set(SupportsLoRA.__annotations__)
    assert wanted <= {name for name in dir(GraftForCausalLM) if not name.startswith("_")}


def test_names_in_adapters_go_through_the_mapper_of_the_model():
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = _vllm_linear.names_of_adapters(lambda layer: f"found.{layer}")
    name = "base_model.model.layers.0.wq.lora_A.weight"
    parsed = parse_fine_tuned_lora_name(name, mapper.get_rename_mapper())
    assert parsed == ("found.layers.0.wq", True)


def test_a_quantized_checkpoint_is_not_quantized_on_load():
    def config(stored, quant, lora):
        model_config = SimpleNamespace(hf_config=SimpleNamespace(quantization_config=stored))
        return SimpleNamespace(model_config=model_config, quant_config=quant, lora_config=lora)

    assert _vllm_linear.asked_for(config(None, None, None)) is None
    assert _vllm_linear.asked_for(config(None, object(), None)) == "quantization"
    assert _vllm_linear.asked_for(config({"quant_method": "fp8"}, object(), None)) is None
    assert _vllm_linear.asked_for(config({"quant_method": "fp8"}, object(), object())) == "LoRA"
