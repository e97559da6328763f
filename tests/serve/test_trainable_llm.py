"""`TrainableLLM`: one module served and trained, and nothing of the old weights left over."""

from __future__ import annotations

import gc
import shutil
from contextlib import contextmanager

import pytest
import torch

import vllm_graft
from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan
from tests.serve.test_cli_serve import with_tokenizer
from tests.support import generate, prompts, qwen3_checkpoint, sampled_logprobs

pytestmark = pytest.mark.engine

FACTORY = "examples.custom_models.qwen3_torchtitan:build_qwen3_torchtitan"


@contextmanager
def trainable(checkpoint, factory=FACTORY, **options):
    defaults = {
        "dtype": "float32", "max_model_len": 512, "enforce_eager": True,
        "skip_tokenizer_init": True, "enable_prefix_caching": True,
    }  # fmt: skip
    llm = vllm_graft.TrainableLLM(str(checkpoint), factory=factory, **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"), num_hidden_layers=2)


def both(llm, tokens, **sampling):
    """The engine's log-probs and the training forward's, for fresh completions."""
    completions = generate(llm, tokens, **sampling)
    sequences = [p + list(c.token_ids) for p, c in zip(tokens, completions, strict=True)]
    scored = llm.token_logprobs(sequences, [len(p) for p in tokens])
    return [sampled_logprobs(c) for c in completions], [s.tolist() for s in scored]


def step(llm, kind=torch.optim.SGD, **options):
    optimizer = kind(llm.model.parameters(), **{"lr": 0.05, **options})
    llm.token_logprobs([prompts((40,))[0]], [10])[0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def fused_sgd(llm):
    step(llm, fused=True)


def fused_adamw(llm):
    step(llm, torch.optim.AdamW, lr=1e-3, fused=True)


def served_optimizer(llm):
    step(llm, vllm_graft.ServedOptimizer, lr=1e-3, fused=True)


def in_place(llm):
    with torch.no_grad():
        for parameter in llm.model.parameters():
            parameter.mul_(1.01)


def load(llm):
    state = {name: value * 1.01 for name, value in llm.model.state_dict().items()}
    llm.model.load_state_dict(state)


def through_data(llm):
    next(llm.model.parameters()).data.mul_(1.01)


def one_number_through_data(llm):
    llm.model.model.layers["1"].attention.wo.weight.data[3, 5] += 1.0


def other_storage(llm):
    parameter = llm.model.model.lm_head.weight
    parameter.data = parameter.data * 1.01


def through_numpy(llm):
    llm.model.model.lm_head.weight.detach().numpy()[:] *= 1.01


def announced_data(llm):
    for parameter in llm.model.parameters():
        parameter.data.mul_(1.01)
    llm.weights_changed()


ROUTES = [
    step, fused_sgd, fused_adamw, served_optimizer, in_place, load, through_data,
    one_number_through_data, other_storage, through_numpy, announced_data,
]  # fmt: skip


def test_every_route_of_a_change_reaches_the_next_generation(checkpoint):
    tokens = prompts((300, 9))
    with trainable(checkpoint) as llm:
        for route in ROUTES:
            before, _ = both(llm, tokens)
            again, _ = both(llm, tokens)  # from the prefix cache
            assert again == before, route
            route(llm)
            served, trained = both(llm, tokens)
            assert served == trained, route
            assert served != before, route


def test_a_reload_is_a_change_too(checkpoint):
    tokens = prompts((300,))
    with trainable(checkpoint) as llm:
        before, _ = both(llm, tokens)
        in_place(llm)
        changed, _ = both(llm, tokens)
        llm.collective_rpc("reload_weights")
        assert both(llm, tokens) == (before, before) != (changed, changed)


def test_unchanged_weights_keep_the_prefix_cache(checkpoint):
    with trainable(checkpoint) as llm:
        tokens = prompts((300,))
        generate(llm, tokens)
        [output] = llm.generate([{"prompt_token_ids": tokens[0]}], use_tqdm=False)
        assert output.num_cached_tokens == 256
        both(llm, tokens)  # training forwards change nothing
        [output] = llm.generate([{"prompt_token_ids": tokens[0]}], use_tqdm=False)
        assert output.num_cached_tokens == 256


def test_train_mode_does_not_reach_serving(checkpoint):
    with trainable(checkpoint) as llm:
        tokens = prompts((20,))
        before, _ = both(llm, tokens)
        llm.model.train()
        assert both(llm, tokens) == (before, before)
        assert all(m.training for m in llm.model.modules())


@pytest.mark.parametrize(
    "route", [step, fused_sgd, fused_adamw, served_optimizer, in_place, announced_data]
)
def test_requests_in_flight_go_on_with_the_new_weights(checkpoint, route):
    from vllm import SamplingParams

    tokens = prompts((140,))[0]
    with trainable(checkpoint) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=30, logprobs=0, ignore_eos=True)
        llm.llm_engine.add_request("0", {"prompt_token_ids": tokens}, params)
        for _ in range(10):
            llm.llm_engine.step()
        route(llm)
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
        completion = outputs[0].outputs[0]
        served = sampled_logprobs(completion)
        [new] = llm.token_logprobs([tokens + list(completion.token_ids)], [len(tokens)])
        equal = [a == b for a, b in zip(served, new.tolist(), strict=True)]
        # The first 10 tokens are of the old weights, all later ones wholly of the new.
        assert equal == [False] * 10 + [True] * 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_and_the_engine_lives(checkpoint, value):
    with trainable(checkpoint) as llm:
        tokens = prompts((9,))
        before, _ = both(llm, tokens)
        weight = llm.model.model.layers["1"].attention.wo.weight
        kept = weight[0, 0].item()
        with torch.no_grad():
            weight[0, 0] = value
        for _ in range(2):
            with pytest.raises(vllm_graft.WeightError, match=r"layers\.1\.attention\.wo\.weight"):
                generate(llm, tokens)
        with torch.no_grad():
            weight[0, 0] = kept
        assert both(llm, tokens) == (before, before)


def test_exchanged_parameters_are_refused_and_the_engine_lives(checkpoint):
    with trainable(checkpoint) as llm:
        tokens = prompts((9,))
        before, _ = both(llm, tokens)
        head = llm.model.model.lm_head
        kept = head.weight
        head.weight = torch.nn.Parameter(kept.detach() * 2)
        with pytest.raises(vllm_graft.WeightError, match="lm_head.weight.*copy_"):
            generate(llm, tokens)
        head.weight = kept
        assert both(llm, tokens) == (before, before)
        data = kept.data
        kept.data = data[:-1]
        with pytest.raises(vllm_graft.WeightError, match=r"lm_head.weight changed its shape"):
            generate(llm, tokens)
        kept.data = data
        assert both(llm, tokens) == (before, before)


def test_impossible_requests_for_logprobs_are_refused(checkpoint):
    with trainable(checkpoint) as llm:
        tokens = prompts((9,))
        for sequences, lengths, message in (
            ([[1, 512]], [1], r"sequence 0, position 1: token 512 is not in the vocabulary of 512"),
            ([[1, 2]], [0], r"prompt_lens is 0, expected 1 to 2"),
            ([[1, 2]], [1, 1], r"1 sequences but 2 prompt_lens"),
            ([[1] * 513], [1], r"513 tokens; the engine's max_model_len is 512"),
        ):
            with pytest.raises(ValueError, match=message):
                llm.token_logprobs(sequences, lengths)
        assert llm.token_logprobs([], []) == []
        assert llm.token_logprobs([[1, 2]], [2])[0].shape == (0,)
        assert both(llm, tokens)


def test_a_factory_or_an_architecture_is_needed(checkpoint):
    with pytest.raises(ValueError, match="factory="):
        vllm_graft.TrainableLLM(str(checkpoint))


def test_sleep_mode_is_refused(checkpoint):
    with pytest.raises(ValueError, match="enable_sleep_mode=True: a sleeping engine gives back"):
        vllm_graft.TrainableLLM(str(checkpoint), factory=FACTORY, enable_sleep_mode=True)


def test_ranks_need_torchrun(checkpoint):
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        vllm_graft.TrainableLLM(
            str(checkpoint), factory=build_qwen3_torchtitan, tensor_parallel_size=2
        )


def test_stages_are_refused(checkpoint):
    with pytest.raises(ValueError, match="no backward runs from stage to stage"):
        vllm_graft.TrainableLLM(
            str(checkpoint), factory=build_qwen3_torchtitan, pipeline_parallel_size=2
        )


def test_chat_and_beam_search_are_vllms(checkpoint, tmp_path):
    from vllm.sampling_params import BeamSearchParams, SamplingParams

    folder = with_tokenizer(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    with trainable(folder, skip_tokenizer_init=False) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        template = "{{ messages[0]['content'] }}"
        message = [{"role": "user", "content": "w3 w5 w7"}]
        for _ in range(2):
            [said] = llm.chat(message, greedy, chat_template=template, use_tqdm=False)
            [made] = llm.generate(["w3 w5 w7"], greedy, use_tqdm=False)
            assert said.outputs[0].token_ids == made.outputs[0].token_ids
            beams = BeamSearchParams(beam_width=2, max_tokens=8, ignore_eos=True)
            [found] = llm.beam_search([{"prompt": "w3 w5 w7"}], beams)
            best, second = found.sequences
            tokens = [best.tokens, second.tokens]
            scored = llm.token_logprobs(tokens, [len(made.prompt_token_ids)] * 2)
            sums = [best.cum_logprob, second.cum_logprob]
            # Float32 numbers, added up in Python's order.
            assert [float(sum(s.tolist())) for s in scored] == pytest.approx(sums, abs=1e-5)
            in_place(llm)
