"""The Custom Model API's Quick Start with `my_library` as the user's library.

What the guide leaves to the reader is filled in: the mapping of the remaining
weights. Everything else is as a first user types it.
"""

import torch.nn as nn
from vllm.model_executor.custom_models import (
    VLLMModelForCausalLM,
    replace_with_trainable_attention,
)
from vllm.model_executor.models import ModelRegistry


class MyCustomModelForCausalLM(VLLMModelForCausalLM):
    supports_pp = False
    supports_multimodal = False

    def __init__(self, vllm_config, parallel_context=None, **kwargs):
        super().__init__()
        assert vllm_config is not None, "vllm_config is required"
        from my_library import MyModel, MyModelConfig

        hf_config = vllm_config.hf_config
        model_config = MyModelConfig(
            vocab_size=hf_config.vocab_size,
            hidden_size=hf_config.hidden_size,
        )
        self.model = MyModel(model_config)
        replace_with_trainable_attention(self.model, use_mla=False)

    def get_input_embeddings(self, input_ids):
        return self.model.tok_embeddings(input_ids)

    def forward(self, input_ids, positions=None, **kwargs):
        return self.model(input_ids)

    def compute_logits(self, hidden_states, sampling_metadata=None):
        return self.model.output(hidden_states)

    def load_weights(self, weights_iter):
        from vllm.model_executor.custom_models import load_external_weights

        name_mapping = {
            "model.embed_tokens.weight": "tok_embeddings.weight",
            "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attention.wq.weight",
            "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attention.wk.weight",
            "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attention.wv.weight",
            "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attention.wo.weight",
            "model.layers.{}.norm.weight": "layers.{}.norm.weight",
            "model.layers.{}.up.weight": "layers.{}.up.weight",
            "model.layers.{}.up.bias": "layers.{}.up.bias",
            "model.layers.{}.down.weight": "layers.{}.down.weight",
            "model.layers.{}.down.bias": "layers.{}.down.bias",
            "lm_head.weight": "output.weight",
        }
        loaded, skipped = load_external_weights(
            model=self.model, weights_iter=weights_iter, name_mapping=name_mapping
        )
        print(f"Loaded {loaded} parameters, skipped {skipped}")


def build_my_custom_model(vllm_config, parallel_context) -> nn.Module:
    model = MyCustomModelForCausalLM(vllm_config=vllm_config, parallel_context=parallel_context)
    return model


ModelRegistry.register_model("MyCustomModel", build_my_custom_model)
