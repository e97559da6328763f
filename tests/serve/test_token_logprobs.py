"""`token_logprobs` gives the engine's own numbers in every mode, and the right gradients."""

from __future__ import annotations

import pytest
import torch

from tests.serve.test_trainable_llm import trainable
from tests.support import MIXED_LENGTHS, prompts, qwen3_checkpoint, relative_error, sampled_logprobs

pytestmark = pytest.mark.engine

MANY = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    {"min_p": 0.05},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.3, "temperature": 0.8},
    {"logit_bias": {5: 4.0, 7: -3.0, 11: 2.5}, "repetition_penalty": 0.8, "top_p": 0.95},
    {"temperature": 0.0, "logit_bias": {3: 1.0}, "frequency_penalty": 0.2},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"), num_hidden_layers=2)


def sample(llm, tokens, params):
    """Completions and sequences of one request per prompt."""
    outputs = llm.generate([{"prompt_token_ids": p} for p in tokens], params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    return completions, [p + list(c.token_ids) for p, c in zip(tokens, completions, strict=True)]


def settings(many, max_tokens=24):
    from vllm import SamplingParams

    return [
        SamplingParams(logprobs=0, ignore_eos=True, max_tokens=max_tokens, detokenize=False, **m)
        for m in many
    ]


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_sampling_parameter_is_mirrored(checkpoint, dtype, mode):
    with trainable(checkpoint, dtype=dtype, logprobs_mode=mode) as llm:
        tokens = prompts(MIXED_LENGTHS)
        lengths = [len(p) for p in tokens]
        for params in [settings(MANY), *[settings([one] * len(tokens)) for one in MANY]]:
            completions, sequences = sample(llm, tokens, params)
            scored = llm.token_logprobs(sequences, lengths, params)
            served = [sampled_logprobs(c) for c in completions]
            assert [s.tolist() for s in scored] == served, params[0]
            # Each for itself and in another order: the same numbers.
            alone = llm.token_logprobs(sequences[::-1], lengths[::-1], params[::-1])
            assert [s.tolist() for s in alone[::-1]] == served
            alone = [
                llm.token_logprobs([s], [n], p)[0].tolist()
                for s, n, p in zip(sequences, lengths, params, strict=True)
            ]
            assert alone == served


def reference(llm, sequences, lengths, params):
    """Float64, one sample at a time, the sampler written out; masks from the served numbers."""
    from copy import deepcopy

    model = deepcopy(llm.model).double()
    total = torch.zeros((), dtype=torch.float64)
    for tokens, prompt, p in zip(sequences, lengths, params, strict=True):
        hidden = model(torch.tensor(tokens), positions=torch.arange(len(tokens)))
        logits = model.compute_logits(hidden)
        for position in range(prompt, len(tokens)):
            row = logits[position - 1].clone()
            for token, bias in (p.logit_bias or {}).items():
                row[token] = row[token] + bias
            before = torch.tensor(sorted(set(tokens[:position])))
            factor = p.repetition_penalty
            row[before] = torch.where(row[before] > 0, row[before] / factor, row[before] * factor)
            made = torch.bincount(torch.tensor(tokens[prompt:position] or [0]), minlength=512)
            made = made if position > prompt else made * 0
            row = row - p.frequency_penalty * made - p.presence_penalty * (made > 0)
            row = row / p.temperature if p.temperature > 0 else row
            probabilities = row.softmax(-1)
            if p.min_p:
                removed = probabilities < p.min_p * probabilities.max()
                row = row.masked_fill(removed, float("-inf"))
            if p.top_k:
                row = row.masked_fill(row < row.topk(p.top_k).values[-1], float("-inf"))
            if p.top_p < 1:
                ordered, index = row.sort()
                removed = ordered.softmax(-1).cumsum(-1) <= 1 - p.top_p
                row = row.masked_fill(
                    torch.zeros(512, dtype=torch.bool).scatter(0, index, removed), float("-inf")
                )
            total = total + row.log_softmax(-1)[tokens[position]] * (1 + position % 3)
    total.backward()
    return total.detach(), {n: p.grad for n, p in model.named_parameters()}


def weighted(scored, lengths):
    return sum(
        (s * torch.tensor([1.0 + (n + i) % 3 for i in range(len(s))])).sum()
        for s, n in zip(scored, lengths, strict=True)
    )


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_gradients_equal_a_float64_reference(checkpoint, mode):
    with trainable(checkpoint, logprobs_mode=mode) as llm:
        tokens = prompts((3, 17, 40))
        lengths = [len(p) for p in tokens]
        many = [MANY[3], MANY[7], MANY[6]]
        params = settings(many, max_tokens=12)
        _, sequences = sample(llm, tokens, params)
        plain = settings([{}] * 3) if mode == "raw_logprobs" else params
        want, gradients = reference(llm, sequences, lengths, plain)
        loss = weighted(llm.token_logprobs(sequences, lengths, params), lengths)
        loss.backward()
        assert relative_error(loss, want) < 1e-5  # float32 sums
        for name, parameter in llm.model.named_parameters():
            assert relative_error(parameter.grad, gradients[name]) < 1e-5, name
        # One sample at a time, the same gradients but for the order of sums.
        packed = {n: p.grad.clone() for n, p in llm.model.named_parameters()}
        llm.model.zero_grad()
        for s, n, p in zip(sequences, lengths, params, strict=True):
            weighted(llm.token_logprobs([s], [n], p), [n]).backward()
        for name, parameter in llm.model.named_parameters():
            assert relative_error(parameter.grad, packed[name]) < 1e-5, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_checkpointed_layers_and_autocast_give_the_same_bits(checkpoint, dtype):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    with trainable(checkpoint, dtype=dtype) as llm:
        tokens = prompts((3, 140))
        lengths = [len(p) for p in tokens]
        params = settings([{}] * 2)
        completions, sequences = sample(llm, tokens, params)
        weighted(llm.token_logprobs(sequences, lengths), lengths).backward()
        want = {n: p.grad.clone() for n, p in llm.model.named_parameters()}
        llm.model.zero_grad()
        layers = llm.model.model.layers
        for name, layer in list(layers.items()):
            layers[name] = checkpoint_wrapper(layer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scored = llm.token_logprobs(sequences, lengths)
        assert [s.tolist() for s in scored] == [sampled_logprobs(c) for c in completions]
        weighted(scored, lengths).backward()
        grads = {
            n.replace("_checkpoint_wrapped_module.", ""): p.grad
            for n, p in llm.model.named_parameters()
        }
        assert [name for name in want if not torch.equal(grads[name], want[name])] == []


def test_tokens_that_cannot_have_been_sampled_are_refused(checkpoint):
    with trainable(checkpoint, logprobs_mode="processed_logprobs") as llm:
        params = settings([{"top_k": 1, "temperature": 1.0}])
        _, [sequence] = sample(llm, prompts((9,)), params)
        sequence[12] = (sequence[12] + 1) % 512
        with pytest.raises(ValueError, match="sequence 0, position 12: token .* probability 0"):
            llm.token_logprobs([sequence], [9], params)
        with pytest.raises(ValueError, match="min_tokens=3"):
            llm.token_logprobs([sequence], [9], settings([{"min_tokens": 3}]))
        llm.token_logprobs([sequence[:12]], [9], params)


def test_other_logprobs_modes_are_refused(checkpoint):
    with (
        trainable(checkpoint, logprobs_mode="raw_logits") as llm,
        pytest.raises(ValueError, match="reports raw_logits"),
    ):
        llm.token_logprobs([[1, 2]], [1])
