"""What cannot be served is refused at start, with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vllm_graft
from tests.support import engine, generate, live_module, qwen3_checkpoint
from vllm_graft import VLLMModelForCausalLM, WeightError

pytestmark = pytest.mark.engine


def start(checkpoint, factory) -> None:
    vllm_graft.register("Refused", factory)
    with engine(checkpoint, "Refused", dtype="float32"):
        pass


@pytest.fixture
def base(my_library):
    import quick_start

    return quick_start.MyCustomModelForCausalLM


class Incomplete(VLLMModelForCausalLM):
    def __init__(self, vllm_config, parallel_context=None):
        super().__init__()

    def get_input_embeddings(self, input_ids): ...
    def compute_logits(self, hidden_states, sampling_metadata=None): ...
    def load_weights(self, weights_iter): ...


def test_a_missing_method_is_named(my_checkpoint):
    with pytest.raises(TypeError, match="abstract method '?forward"):
        start(my_checkpoint, Incomplete)


def test_what_is_not_a_model_is_named(my_checkpoint):
    with pytest.raises(TypeError, match="the factory returned dict, not an nn.Module"):
        start(my_checkpoint, lambda config, context: {})
    with pytest.raises(TypeError, match="Linear has no get_input_embeddings, compute_logits"):
        start(my_checkpoint, lambda config, context: nn.Linear(2, 2))


def test_multimodal_is_refused(my_checkpoint, base):
    class Multimodal(base):
        supports_multimodal = True

    with pytest.raises(ValueError, match="supports_multimodal = True, but Graft serves text only"):
        start(my_checkpoint, Multimodal)


def test_a_model_whose_attention_was_not_swapped_is_refused(my_checkpoint, base, my_library):
    class Unswapped(base):
        def __init__(self, vllm_config, parallel_context=None):
            VLLMModelForCausalLM.__init__(self)
            self.model = my_library.MyModel(my_library.MyModelConfig(256, 128))

    with pytest.raises(ValueError, match="Unswapped has no CoreAttention"):
        start(my_checkpoint, Unswapped)


def test_attention_that_runs_twice_in_a_forward_is_refused(my_checkpoint, base):
    class Twice(base):
        def __init__(self, vllm_config, parallel_context=None):
            super().__init__(vllm_config, parallel_context)
            self.model.layers.append(self.model.layers[0])

    with pytest.raises(RuntimeError, match=r"layers.0.attention.core: this attention ran twice"):
        start(my_checkpoint, Twice)


def test_attention_that_never_runs_is_refused(my_checkpoint, base):
    class Unused(base):
        def __init__(self, vllm_config, parallel_context=None):
            super().__init__(vllm_config, parallel_context)
            self.spare = vllm_graft.CoreAttention(4, 2, 32)

    with pytest.raises(RuntimeError, match="no forward reaches: spare"):
        start(my_checkpoint, Unused)


def test_logits_of_another_width_are_refused(my_checkpoint, base):
    class Narrow(base):
        def compute_logits(self, hidden_states, sampling_metadata=None):
            return super().compute_logits(hidden_states)[:, :100]

    with pytest.raises(
        RuntimeError, match=r"compute_logits returned \(1, 100\).*expected \(1, 256"
    ):
        start(my_checkpoint, Narrow)


def test_a_forward_that_runs_on_neither_shape_shows_both_errors(my_checkpoint, base):
    class Broken(base):
        def forward(self, input_ids, positions=None, **kwargs):
            raise ValueError(f"no {input_ids.dim()} dimensions")

    with pytest.raises(RuntimeError, match=r"(?s)\[T\] tokens.*no 1 dim.*\[1, T\].*no 2 dim"):
        start(my_checkpoint, Broken)


@pytest.mark.parametrize("style", ["nothing", "all but one", "through data", "claims"])
def test_parameters_without_a_value_are_refused_whatever_the_loader_returns(
    my_checkpoint, base, style
):
    class Loader(base):
        def load_weights(self, weights_iter):
            if style in ("nothing", "claims"):
                list(weights_iter)
                claimed = {name for name, _ in self.named_parameters()}
                return claimed if style == "claims" else None
            for parameter in list(self.parameters())[1:]:
                if style == "through data":
                    parameter.data.copy_(torch.zeros_like(parameter))
                else:
                    with torch.no_grad():
                        parameter.zero_()
            return None

    with pytest.raises(WeightError, match=r"(?s)left without a value:\n  model.tok_embeddings"):
        start(my_checkpoint, Loader)


def test_nan_values_in_a_checkpoint_are_called_so(my_checkpoint, base, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(my_checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(WeightError, match="the checkpoint has NaN values in model.output.weight"):
        start(broken, base)


def test_one_missing_norm_is_missing_and_not_nan(tmp_path):
    from safetensors.torch import load_file, save_file

    from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan

    checkpoint = qwen3_checkpoint(tmp_path, num_hidden_layers=1)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(WeightError, match=r"1 parameter was left.*\n.*layers.0.attention_norm"):
        start(checkpoint, build_qwen3_torchtitan)


class Convolution(nn.Module):
    def forward(self, x):
        return x + 0.5 * torch.roll(x, 1, dims=-2)


@pytest.mark.parametrize("kind", ["second attention", "convolution", "own positions"])
def test_whatever_mixes_requests_is_refused(kind, my_checkpoint, base, my_library):
    class Mixing(base):
        def __init__(self, vllm_config, parallel_context=None):
            super().__init__(vllm_config, parallel_context)
            self.extra = {
                "second attention": lambda: my_library.Attention(
                    my_library.MyModelConfig(256, 128)
                ),
                "convolution": Convolution,
                "own positions": lambda: nn.Embedding(64, 128),
            }[kind]()
            for parameter in self.extra.parameters():
                nn.init.normal_(parameter)

        def forward(self, input_ids, positions=None, **kwargs):
            hidden = self.model(input_ids)
            if kind == "second attention":
                return hidden + self.extra(hidden, self.model.freqs_cis[: hidden.shape[1]])
            if kind == "own positions":
                return hidden + self.extra(torch.arange(hidden.shape[-2]))
            return self.extra(hidden)

        def load_weights(self, weights_iter):
            super().load_weights(weights_iter)
            for parameter in self.extra.parameters():
                parameter.data.copy_(torch.randn(parameter.shape))

    with pytest.raises(RuntimeError, match="depends on the other tokens of vLLM's flat batch"):
        start(my_checkpoint, Mixing)


def test_rope_rows_gathered_by_the_model_are_refused(my_checkpoint, base):
    class Gathering(base):
        def forward(self, input_ids, positions=None, **kwargs):
            hidden = self.model.tok_embeddings(input_ids)
            for layer in self.model.layers:
                hidden = layer(hidden, self.model.freqs_cis[positions.flatten()])
            return hidden

    with pytest.raises(RuntimeError, match="already gathered by position"):
        start(my_checkpoint, Gathering)


def test_attention_outside_the_module_tree_is_refused(my_checkpoint, base):
    class Hidden(base):
        def __init__(self, vllm_config, parallel_context=None):
            super().__init__(vllm_config, parallel_context)
            self.plain = [vllm_graft.CoreAttention(4, 2, 32)]

        def forward(self, input_ids, positions=None, **kwargs):
            hidden = self.model(input_ids)
            q = hidden.unflatten(-1, (4, 32))
            return hidden + self.plain[0](q, q[..., :2, :], q[..., :2, :]).flatten(-2)

    with pytest.raises(RuntimeError, match="without a KV cache runs in the engine"):
        start(my_checkpoint, Hidden)


def test_logits_beyond_the_vocabulary_are_cut_off(my_checkpoint, base):
    class Padded(base):
        def compute_logits(self, hidden_states, sampling_metadata=None):
            logits = super().compute_logits(hidden_states)
            return torch.nn.functional.pad(logits, (0, 8), value=1e4)

    vllm_graft.register("Padded", Padded)
    with engine(my_checkpoint, "Padded", dtype="float32") as llm:
        [completion] = generate(llm, [[1, 2, 3]], max_tokens=4)
    assert max(completion.token_ids) < 256


def test_a_module_added_to_a_live_model_serves_in_eval_mode_too(my_checkpoint, base):
    vllm_graft.register("Live", base)
    with engine(my_checkpoint, "Live", dtype="float32") as llm:
        [before] = generate(llm, [[1, 2, 3]], max_tokens=8)
        for layer in live_module(llm).model.layers:
            layer.dropout = nn.Dropout(0.9).train()
        [after] = generate(llm, [[1, 2, 3]], max_tokens=8)
    assert list(after.token_ids) == list(before.token_ids)
