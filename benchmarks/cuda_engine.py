"""Serve a hand-written Qwen3 through Graft on a card, beside vLLM's own, and compare log-probs.

    python benchmarks/cuda_engine.py --model graft --invariant

Needs vLLM with CUDA. Weights are random, shapes are Qwen3-0.6B's. One process
measures one setting: the first start, decode speed of 32 requests, and for
`--model graft` whether a training forward of the live module gives the
log-probabilities that the engine reported, and a backward. `--invariant` sets
`VLLM_BATCH_INVARIANT=1`, for the engine and for the training forward alike. The
last line is one JSON object.

Legend: T tokens, D width, H head dim.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_graft import TrainableFlashAttention, VLLMModelForCausalLM

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BATCH, PROMPT, NEW = 32, 128, 128
EXACT_PROMPTS = (1, 2, 17, 64, 129, 300)
EXACT_NEW = 40


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = TrainableFlashAttention(
            width,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            use_qk_norm=True,
        )
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.attention_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)

    def forward(self, x_TD: torch.Tensor, table: torch.Tensor, at: Any) -> torch.Tensor:
        """Hidden states after the block."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), table, positions=at)
        gate, up = self.gate_up(self.mlp_norm(x_TD)).chunk(2, dim=-1)
        mixed: torch.Tensor = x_TD + self.down(F.silu(gate) * up)
        return mixed


class HandWritten(VLLMModelForCausalLM):
    """A Qwen3-shaped model in plain PyTorch, without fused operations."""

    def __init__(self, vllm_config: Any, parallel_context: Any = None, **kwargs: Any) -> None:
        super().__init__()
        config = vllm_config.hf_config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        places = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles = places[:, None] * CONFIG["rope_theta"] ** (-steps / config.head_dim)
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles), False)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids."""
        embedded: torch.Tensor = self.embedding(input_ids)
        return embedded

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Hidden states `[T, D]`."""
        x_TD = self.get_input_embeddings(input_ids)
        for layer in self.layers:
            x_TD = layer(x_TD, self.table, positions)
        hidden: torch.Tensor = self.norm(x_TD)
        return hidden

    def compute_logits(
        self, hidden_states: torch.Tensor, sampling_metadata: Any = None
    ) -> torch.Tensor:
        """Logits `[T, V]`."""
        logits: torch.Tensor = self.head(hidden_states)
        return logits

    def load_weights(self, weights: Any) -> None:
        """Nothing to load: the weights are random."""
        raise NotImplementedError("benchmarks/cuda_engine.py runs with load_format='dummy'")


def build_hand_written(vllm_config: Any, parallel_context: Any) -> HandWritten:
    """Factory for `vllm_graft.register`."""
    return HandWritten(vllm_config, parallel_context)


def start(model: str, *, eager: bool) -> Any:
    """An in-process engine with random weights."""
    from vllm import LLM

    import vllm_graft

    arch = CONFIG["architectures"][0]
    if model == "graft":
        arch = "HandWritten"
        vllm_graft.register(arch, build_hand_written)
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    # No Inductor on either side; decode steps are CUDA graphs.
    graphs = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    return LLM(
        str(folder),
        hf_overrides={"architectures": [arch]},
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=64,
        gpu_memory_utilization=0.4,
        disable_log_stats=True,
        **({"enforce_eager": True} if eager else graphs),
    )


def live(llm: Any) -> Any:
    """The module that the engine runs."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.get_model()


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Matrices from a normal distribution, norms at 1."""
    for parameter in module.parameters():
        parameter.normal_(0, 0.05) if parameter.dim() > 1 else parameter.fill_(1.0)


def random_prompts(lengths: list[int]) -> list[Any]:
    """Prompts of token ids."""
    ids = (torch.randint(5, CONFIG["vocab_size"], (n,)).tolist() for n in lengths)
    return [{"prompt_token_ids": one} for one in ids]


def generate(llm: Any, prompts: list[Any], new: int, **options: Any) -> Any:
    """Sample `new` tokens for every prompt."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False, **options)
    return llm.generate(prompts, params, use_tqdm=False)


def decode_step_ms(llm: Any) -> float:
    """Median time of one decode step of `BATCH` requests: long run minus short run."""
    prompts = random_prompts([PROMPT] * BATCH)
    generate(llm, prompts, 8)

    def seconds(new: int) -> float:
        begin = time.perf_counter()
        generate(llm, prompts, new)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    return 1e3 / NEW * statistics.median(seconds(NEW + 1) - seconds(1) for _ in range(3))


def compare_log_probs(llm: Any, model: Any) -> dict[str, Any]:
    """Sampled log-probabilities of the engine against the training forward, and a backward."""
    prompts = random_prompts(list(EXACT_PROMPTS))
    outputs = generate(llm, prompts, EXACT_NEW, logprobs=0)
    differences, trained = [], torch.zeros(())
    for prompt, output in zip(prompts, outputs, strict=True):
        before, sampled = prompt["prompt_token_ids"], output.outputs[0]
        ids = torch.tensor(before + list(sampled.token_ids), device="cuda")
        hidden = model(ids, positions=torch.arange(len(ids), device="cuda"))
        log_probs = model.compute_logits(hidden).float().log_softmax(-1)
        trained = log_probs[len(before) - 1 : -1].gather(1, ids[len(before) :, None])[:, 0]
        served = [p[t].logprob for t, p in zip(sampled.token_ids, sampled.logprobs, strict=True)]
        differences += [abs(a - b) for a, b in zip(served, trained.tolist(), strict=True)]
    trained.sum().backward()
    return {
        "log_probs": len(differences),
        "equal": sum(d == 0 for d in differences),
        "largest_difference": max(differences),
        "parameters": sum(1 for _ in model.parameters()),
        "with_gradient": sum(p.grad is not None for p in model.parameters()),
    }


def main() -> None:
    """Measure one setting."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["graft", "native"], default="graft")
    parser.add_argument("--invariant", action="store_true", help="VLLM_BATCH_INVARIANT=1")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(args.invariant))
    begin = time.perf_counter()
    llm = start(args.model, eager=args.eager)
    result: dict[str, Any] = vars(args) | {"start_s": time.perf_counter() - begin}
    module = live(llm)
    randomize(module)
    result["decode_step_ms"] = decode_step_ms(llm)
    if args.model == "graft":
        result |= compare_log_probs(llm, module.model)
    import vllm

    result |= {"vllm": vllm.__version__, "torch": torch.__version__}
    result["card"] = torch.cuda.get_device_name()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
