"""`TrainableAsyncLLM`: requests and training interleaved in one event loop."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

import vllm_graft
from tests.serve.test_trainable_llm import FACTORY
from tests.support import prompts, qwen3_checkpoint, sampled_logprobs

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"), num_hidden_layers=2)


def run(checkpoint, story):
    async def main():
        llm = vllm_graft.TrainableAsyncLLM(
            str(checkpoint), factory=FACTORY, dtype="float32", max_model_len=512,
            enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=True,
        )  # fmt: skip
        try:
            return await story(llm)
        finally:
            llm.shutdown()

    return asyncio.run(main())


async def ask(llm, name, tokens, max_tokens=20):
    from vllm import SamplingParams

    params = SamplingParams(logprobs=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    async for output in llm.generate({"prompt_token_ids": tokens}, params, name):
        last = output
    return last.outputs[0]


def scored(llm, tokens, completion):
    [new] = llm.token_logprobs([tokens + list(completion.token_ids)], [len(tokens)])
    return new.tolist()


def test_requests_are_exact_before_and_after_a_step(checkpoint):
    async def story(llm):
        tokens = prompts((5, 140, 300))
        for round_ in range(2):
            made = await asyncio.gather(
                *(ask(llm, f"{round_}-{i}", t) for i, t in enumerate(tokens))
            )
            served = [sampled_logprobs(c) for c in made]
            assert served == [scored(llm, t, c) for t, c in zip(tokens, made, strict=True)]
            loss = -torch.cat(
                llm.token_logprobs(
                    [t + list(c.token_ids) for t, c in zip(tokens, made, strict=True)],
                    [len(t) for t in tokens],
                )
            ).mean()
            loss.backward()
            torch.optim.SGD(llm.model.parameters(), lr=0.1).step()
            after = [scored(llm, t, c) for t, c in zip(tokens, made, strict=True)]
            assert after != served

    run(checkpoint, story)


def test_weights_that_change_in_flight_and_cancelled_requests(checkpoint):
    async def story(llm):
        async def train():
            for _ in range(5):
                await asyncio.sleep(0.05)
                with torch.no_grad():
                    for parameter in llm.model.parameters():
                        parameter.mul_(1.001)

        generator = random.Random(0)
        tokens = prompts([generator.randint(1, 200) for _ in range(24)])
        tasks = [asyncio.create_task(ask(llm, str(i), t)) for i, t in enumerate(tokens)]
        training = asyncio.create_task(train())
        await asyncio.sleep(0.02)
        for index in (3, 9, 14):
            tasks[index].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        await training
        finished = [c for i, c in enumerate(done) if i not in (3, 9, 14)]
        assert all(len(c.token_ids) == 20 for c in finished)
        last = await ask(llm, "last", tokens[0])
        assert sampled_logprobs(last) == scored(llm, tokens[0], last)
        assert llm.get_num_unfinished_requests() == 0

    run(checkpoint, story)


def test_bad_weights_fail_the_requests_and_the_engine_lives(checkpoint):
    from vllm.v1.engine.exceptions import EngineGenerateError

    async def story(llm):
        [tokens] = prompts((9,))
        weight = llm.model.model.lm_head.weight
        kept = weight[0, 0].item()
        with torch.no_grad():
            weight[0, 0] = float("nan")
        for name in ("b", "c"):
            with pytest.raises(EngineGenerateError) as caught:
                await ask(llm, name, tokens)
            assert isinstance(caught.value.__cause__, vllm_graft.WeightError)
            assert "lm_head.weight" in str(caught.value.__cause__)
        with torch.no_grad():
            weight[0, 0] = kept
        after = await ask(llm, "d", tokens)
        assert sampled_logprobs(after) == scored(llm, tokens, after)

    run(checkpoint, story)


def test_more_ranks_are_refused(checkpoint):
    with pytest.raises(ValueError, match="one rank"):
        vllm_graft.TrainableAsyncLLM(str(checkpoint), factory=FACTORY, tensor_parallel_size=2)
