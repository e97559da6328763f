"""The child process of one contender: reads JSON commands, answers in JSON lines.

Commands come on stdin: `{"do": "start", "llm": {...}}`, `{"do": "round", "seed": 1, ...}`,
`{"do": "memory"}`, `{"do": "python"}`, `{"do": "kernels", ...}`; the end of stdin ends the
process. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

from vllm_graft.bench.machine import OtherLoad, rss_gib

_NAME = 100
"""So much of the name of a kernel says which it is."""


class Engine:
    """A vLLM engine in this process."""

    def __init__(self) -> None:
        self.llm: Any = None

    def start(self, llm: dict[str, Any]) -> dict[str, float]:
        """Build the engine; seconds in `vllm.LLM(...)`."""
        from vllm import LLM

        begun = time.perf_counter()
        self.llm = LLM(**llm)
        return {"engine_s": time.perf_counter() - begun}

    def round(self, seed: int, batch_size: int, prompt_len: int, output_len: int) -> dict[str, Any]:
        """Seconds to the first token of every prompt, and to the last of all."""
        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        prompts = random_prompts(seed, batch_size, prompt_len, vocabulary)
        others = OtherLoad()
        prefill_s, first = self._generate(prompts, 1)
        total_s, _ = self._generate(prompts, output_len)
        return {
            "prefill_s": prefill_s,
            "total_s": total_s,
            "other_load": others.share(),
            "first_tokens": [tokens[0] for tokens in first],
        }

    def memory(self) -> dict[str, float]:
        """Resident memory in GiB."""
        now, peak = rss_gib()
        return {"rss_gib": now, "peak_rss_gib": peak}

    def python(self, prompt_len: int, output_len: int) -> dict[str, float]:
        """Microseconds of a decode step in Graft's own Python, for one sequence."""
        from vllm_graft.bench.overhead import python_us

        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        prompts = random_prompts(0, 1, prompt_len, vocabulary)
        return {"python_us": python_us(self.llm, lambda: self._generate(prompts, output_len))}

    def kernels(self, batch_size: int, prompt_len: int, output_len: int) -> dict[str, Any]:
        """Kernels on the card per decode step: names, how many, microseconds; slowest first.

        The prefill before the steps is counted among them.
        """
        from torch.profiler import profile

        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        prompts = random_prompts(0, batch_size, prompt_len, vocabulary)
        with profile() as recorded:
            self._generate(prompts, output_len)
        found = [
            (event.key[:_NAME], event.count / output_len, event.self_device_time_total / output_len)
            for event in recorded.key_averages()
            if event.device_type.name == "CUDA"
        ]
        return {"kernels": sorted(found, key=lambda kernel: -kernel[2])}

    def _generate(self, prompts: list[list[int]], output_len: int) -> tuple[float, list[list[int]]]:
        from vllm import SamplingParams

        greedy = SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        begun = time.perf_counter()
        outputs = self.llm.generate(requests, greedy, use_tqdm=False)
        seconds = time.perf_counter() - begun
        made = [list(output.outputs[0].token_ids) for output in outputs]
        if any(len(tokens) != output_len for tokens in made):
            raise RuntimeError(f"expected {output_len} new tokens each, got {[*map(len, made)]}")
        return seconds, made


def random_prompts(seed: int, batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """Token ids, equal for equal arguments in every process."""
    draw = random.Random(seed)  # noqa: S311 - repeatable, not secret
    return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(batch)]


def answer(engine: Engine, line: str) -> dict[str, Any]:
    """Carry out one command; an error becomes `{"error": text}`."""
    command = json.loads(line)
    try:
        result: dict[str, Any] = getattr(engine, command.pop("do"))(**command)
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return result


def main() -> None:
    """Answer commands until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    engine = Engine()
    for line in sys.stdin:
        replies.write(json.dumps(answer(engine, line)) + "\n")


if __name__ == "__main__":
    main()
