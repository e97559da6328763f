"""What Graft uses of vLLM's internals, one test per use, run against every release.

When one of these fails on a new release, `vllm_graft/serve/_vllm.py` is the
place to mend; when one says that vLLM now does the job, the patch can go.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from tests.support import python, relative_error
from vllm_graft.attention.kernels import AttentionSpec
from vllm_graft.serve import (
    _vllm,
    _vllm_cpu,
    _vllm_cuda,
    _vllm_engine,
    _vllm_mla_cuda,
    _vllm_packed,
)


def test_the_registry_still_refuses_functions_by_itself():
    """`accept_factories` can go when this fails."""
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if type(f).__name__ != '_Finder']\n"
        "from vllm.model_executor.models import ModelRegistry\n"
        "try: ModelRegistry.register_model('A', lambda c, p: None)\n"
        "except TypeError as error: print('refused', error)"
    )
    assert "refused" in python(code).stdout


def test_register_model_is_a_method_with_the_known_arguments():
    from vllm.model_executor.models import registry

    stock = registry._ModelRegistry.register_model
    assert list(inspect.signature(stock).parameters) == ["self", "model_arch", "model_cls"]
    assert hasattr(stock, "__wrapped__"), "the start-up hook did not patch the registry"


def test_vllm_still_lists_which_models_are_its_own():
    from vllm.model_executor.models.registry import _VLLM_MODELS

    assert _VLLM_MODELS["Qwen3ForCausalLM"] == ("qwen3", "Qwen3ForCausalLM")
    assert _VLLM_MODELS["TransformersForCausalLM"][0] == "transformers"


def test_engines_still_ask_for_their_executor_class():
    from vllm.v1.engine import async_llm, llm_engine
    from vllm.v1.executor.abstract import Executor

    assert "vllm_config" in inspect.signature(Executor.get_class).parameters
    for module in (llm_engine, async_llm):
        assert "Executor.get_class(" in inspect.getsource(module)


@pytest.mark.parametrize(
    ("module", "target", "started_by"),
    [
        ("vllm.v1.engine.core", "EngineCoreProc.run_engine_core", "vllm.v1.engine.utils"),
        (
            "vllm.v1.executor.multiproc_executor",
            "WorkerProc.worker_main",
            "vllm.v1.executor.multiproc_executor",
        ),
    ],
)
def test_engine_processes_still_start_where_the_watch_is_put(module, target, started_by):
    owner, entry = target.split(".")
    run = getattr(getattr(import_module(module), owner), entry)
    assert not hasattr(run.__wrapped__, "__wrapped__"), "vLLM's own function, wrapped once"
    assert f"target={target}" in inspect.getsource(import_module(started_by))


def test_models_are_still_built_by_keyword_with_a_prefix():
    from vllm.model_executor.model_loader import utils

    assert "model_class(vllm_config=vllm_config, prefix=prefix)" in inspect.getsource(utils)


def test_heads_that_ranks_cannot_share_are_still_refused_by_the_configuration():
    from vllm.config.model import ModelConfig

    source = inspect.getsource(inspect.unwrap(ModelConfig.verify_with_parallel_config))
    assert 'raise ValueError(\n                f"Total number of attention heads' in source


def test_vllm_config_still_has_no_hf_config():
    """`give_hf_config` can go when this fails."""
    code = "from vllm.config import VllmConfig; print(hasattr(VllmConfig, 'hf_config'))"
    assert python(code).stdout.strip().endswith("False")


def test_additional_config_is_still_part_of_the_compile_key():
    from vllm.config import VllmConfig

    config = VllmConfig(additional_config={})
    before = config.compute_hash()
    _vllm.extend_compile_key(config, model="digest")
    assert config.compute_hash() != before


def test_inductor_options_still_live_in_the_compilation_config():
    from vllm.config import VllmConfig

    config = VllmConfig()
    _vllm.emulate_eager_rounding(config)
    assert config.compilation_config.inductor_compile_config["emulate_precision_casts"] is True


def test_attention_layers_still_hear_when_loading_is_complete():
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader import reload, utils

    arguments = inspect.signature(Attention.process_weights_after_loading).parameters
    assert list(arguments) == ["self", "act_dtype"]
    assert "process_weights_after_loading" in inspect.getsource(utils)
    assert hasattr(reload, "initialize_layerwise_reload")


def test_the_forward_context_is_still_visible():
    assert _vllm.forward_running()() is False


def test_process_groups_are_none_before_vllm_makes_them():
    code = (
        "from vllm_graft import ParallelContext\n"
        "context = ParallelContext()\n"
        "print(context.get_tp_process_group(), context.get_pp_process_group(),"
        " context.get_tensor_parallel_rank(), context.get_pipeline_parallel_rank())"
    )
    assert python(code).stdout.strip() == "None None 0 0"


def test_the_cpu_kernel_setting_is_still_read_from_the_environment():
    code = "from vllm import envs; print(envs.VLLM_CPU_ATTN_SPLIT_KV)"
    on, off = (python(code, VLLM_CPU_ATTN_SPLIT_KV=value).stdout.strip() for value in "10")
    assert (on[-4:], off[-5:]) == ("True", "False")


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_kernels_result_does_not_depend_on_the_block_size(dtype, block_size, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, heads, 64).to(dtype) for heads in (4, 2, 2))
    borders = torch.tensor([0, 7, 300], dtype=torch.int32)
    want = _vllm_cpu.paged_attention(q, k, v, borders, AttentionSpec(scale=0.125))
    monkeypatch.setattr(_vllm_cpu, "_BLOCK_SIZE", block_size)
    got = _vllm_cpu.paged_attention(q, k, v, borders, AttentionSpec(scale=0.125))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(16, 8, 128), (4, 1, 64), (2, 2, 64)])
def test_the_cpu_kernel_gives_few_queries_the_same_bits_in_any_batch(heads, kv_heads, size, dtype):
    """Its tiles of keys are a few hundred long, and of another length for many queries."""
    torch.manual_seed(0)
    long, other = 1500, 277
    q, k, v = (torch.randn(long + other, n, size).to(dtype) for n in (heads, kv_heads, kv_heads))
    spec = AttentionSpec(scale=size**-0.5)

    def attend(*lengths):
        total, borders = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return _vllm_cpu.paged_attention(q[:total], k[:total], v[:total], borders, spec)

    alone = attend(long)
    assert torch.equal(attend(long, other)[:long], alone)
    assert torch.equal(attend(long, *[1] * 40)[:long], alone)
    assert torch.equal(attend(long - 3), alone[: long - 3])


def test_the_mla_spec_still_takes_what_the_api_promises():
    spec = _vllm.mla_kv_cache_spec(head_size=576, block_size=16, dtype=torch.bfloat16)
    assert type(spec).__name__ == "MLAAttentionSpec" and spec.num_kv_heads == 1


def test_the_released_version_is_one_that_graft_names():
    from importlib.metadata import version

    major, minor = version("vllm-cpu").split(".")[:2]
    assert major == "0" and 31 <= int(minor) <= 32


def test_the_mla_layer_still_copies_the_halves_of_kv_b():
    """`_vllm_mla` can go when this fails: vLLM would read `kv_b_proj` itself."""
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    source = inspect.getsource(MLAAttention.process_weights_after_loading)
    assert 'replace_parameter(self, "W_UV"' in source
    assert 'replace_parameter(self, "W_UK_T"' in source


def test_the_mla_layer_has_the_methods_that_are_replaced():
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    def names(method):
        return list(inspect.signature(method).parameters)

    forward = ["self", "q", "k_c_normed", "k_pe", "kv_cache", "attn_metadata", "output"]
    assert names(MLAAttention.forward_impl)[:7] == forward
    update = ["self", "kv_c_normed", "k_pe", "kv_cache", "slot_mapping", "attn_metadata"]
    assert names(MLAAttention.update_kv_cache)[:6] == update
    assert "attn_backend" in names(MLAAttention.__init__)


def test_the_latent_backend_for_cards_decodes_in_pages_of_one_size(monkeypatch):
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends import fa_utils

    if _vllm.platform_device() == "cpu":  # such a build has no flash attention to import
        missing = dict.fromkeys(("flash_attn_varlen_func", "get_scheduler_metadata"))
        for name in missing:
            monkeypatch.setattr(fa_utils, name, None, raising=False)
        monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", SimpleNamespace(**missing))
    backend = _vllm_mla_cuda.exact_backend.__wrapped__()
    assert backend.get_name() == "FLASH_ATTN_MLA" and backend.supports_batch_invariance()
    assert backend.supports_block_size(64) and not backend.supports_block_size(8)
    builder = backend.get_builder_cls()
    support = builder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.UNIFORM_BATCH
    builder(None, [], None, "cuda")
    assert {*_vllm_mla_cuda.LAYER_SIZES} < {*inspect.signature(MLAAttention.__init__).parameters}
    assert "prefill_backend_cls" in inspect.signature(MLAAttention.__init__).parameters


def test_the_metadata_for_cards_is_made_of_fields_that_builders_are_given():
    from vllm.v1.attention.backend import CommonAttentionMetadata

    given = {*CommonAttentionMetadata.__dataclass_fields__, *vars(CommonAttentionMetadata)}
    asked = re.findall(r"common\.(\w+)", inspect.getsource(_vllm_mla_cuda.pages_of))
    assert {*asked} <= given and len({*asked}) == 6


def test_the_engine_still_ends_groups_while_compiled_pieces_hold_their_graphs(monkeypatch):
    """`free_graphs_at_end` can go when this fails."""
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.v1.engine.core import EngineCore

    assert "cleanup_dist_env_and_memory" in inspect.getsource(EngineCore.shutdown)
    assert "clear" in inspect.getsource(CUDAGraphWrapper.clear_graphs)
    ended, at_exit, mine = [], [], SimpleNamespace()
    wrappers = [
        SimpleNamespace(vllm_config=config, clear_graphs=partial(ended.append, name))
        for name, config in (("mine", mine), ("another's", SimpleNamespace()))
    ]
    monkeypatch.setattr(CUDAGraphWrapper, "_all_instances", wrappers)
    monkeypatch.setattr(_vllm_engine.atexit, "register", at_exit.append)
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=SimpleNamespace(vllm_config=mine)))
    core = SimpleNamespace(
        shutdown=lambda: ended.append("shutdown"),
        model_executor=SimpleNamespace(driver_worker=worker),
    )
    _vllm_engine.free_graphs_at_end(core)
    core.shutdown()
    assert ended == ["mine", "shutdown"]
    at_exit[0]()
    assert ended[2:] == ["mine"]


def test_the_cpu_latent_kernel_takes_one_size_and_block():
    """Graft's padding can go when the kernel takes others."""
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    sizes = [_vllm_cpu.LATENT_RANK + _vllm_cpu.LATENT_ROPE]
    assert CPUMLABackend.get_supported_head_sizes() == sizes
    assert CPUMLABackend.get_supported_kernel_block_sizes() == [_vllm_cpu.LATENT_BLOCK_SIZE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (48, 16)])
def test_the_latent_kernel_gives_a_token_the_same_bits_in_any_batch(dtype, rank, rope):
    torch.manual_seed(0)
    tokens, heads = 150, 4
    kv_c, k_pe = torch.randn(tokens, rank).to(dtype), torch.randn(tokens, rope).to(dtype)
    query = torch.randn(tokens, heads, rank + rope).to(dtype)
    borders = torch.tensor([0, 1, 18, 34, tokens], dtype=torch.int32)
    cache, batch = _vllm_cpu.latent_scratch(kv_c, k_pe, borders)
    whole = _vllm_cpu.latent_attention(query, cache, batch, 0.1, rope)
    for token in range(tokens):
        alone = _vllm_cpu.LatentBatch(
            block_table=batch.block_table[batch.sequence[token]][None],
            sequence=torch.tensor([0]),
            lengths=batch.lengths[token : token + 1],
        )
        one = _vllm_cpu.latent_attention(query[token : token + 1], cache, alone, 0.1, rope)
        assert torch.equal(one[0], whole[token])
    seen = torch.arange(tokens)[None] <= torch.arange(tokens)[:, None]
    mine = batch.sequence[None] == batch.sequence[:, None]
    scores = torch.einsum("tnc,sc->nts", query.double(), torch.cat([kv_c, k_pe], -1).double()) * 0.1
    weights = scores.masked_fill(~(seen & mine), float("-inf")).softmax(-1)
    want = torch.einsum("nts,sr->tnr", weights, kv_c.double())
    # One rounding of the result, and float32 sums over up to 116 keys.
    limit = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(whole, want) < limit


def test_the_engine_steps_through_an_attribute_and_tells_what_runs():
    """`before_each_step` wraps `step_fn`; the checks of `TrainableLLM` hang on it."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient

    assert "self.engine_core.step_fn()" in inspect.getsource(InprocClient.get_output)
    assert "self.step_fn = " in inspect.getsource(EngineCore.__init__)
    parameters = inspect.signature(EngineCore.reset_prefix_cache).parameters
    assert "reset_running_requests" in parameters
    assert "self.running: " in inspect.getsource(Scheduler.__init__)
    assert "self.max_num_scheduled_tokens" in inspect.getsource(Scheduler.schedule)


def test_async_engines_still_need_a_process_of_their_own():
    """`async_in_this_process` can go when this fails."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import EngineCoreClient

    source = inspect.getsource(EngineCoreClient.make_client)
    assert "if asyncio_mode and not multiprocess_mode:\n            raise NotImpl" in source
    assert "EngineCoreClient.make_async_mp_client(" in inspect.getsource(AsyncLLM.__init__)


def test_the_sampler_is_built_of_the_parts_that_are_called():
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.sample.sampler import Sampler

    names = list(inspect.signature(Sampler.apply_logits_processors).parameters)
    assert names == ["self", "logits", "sampling_metadata", "predict_bonus_token"]
    source = inspect.getsource(Sampler.sample)
    order = ["apply_temperature", "argmax_invariant", "self.topk_topp_sampler("]
    assert sorted(order, key=source.index) == order
    assert list(inspect.signature(topk_topp_sampler.apply_top_k_top_p).parameters) == [
        "logits", "k", "p",
    ]  # fmt: skip
    assert {"logitsprocs", "no_penalties", "all_greedy", "all_random"} <= set(
        SamplingMetadata.__dataclass_fields__
    )


def test_the_second_runner_reports_log_probs_by_the_kernel_that_is_called():
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample import logprob, prompt_logprob

    parameters = inspect.signature(logprob.compute_token_logprobs).parameters
    assert list(parameters) == ["logits", "token_ids"]
    assert "compute_token_logprobs(" in inspect.getsource(logprob.compute_topk_scores)
    assert "logprob import" in inspect.getsource(prompt_logprob)
    assert isinstance(VllmConfig.use_v2_model_runner, property)


def test_workers_still_refuse_a_second_update_for_good():
    """`WorkerHooks.abandon` can go when vLLM can call an update off."""
    from vllm.v1.worker.gpu_worker import Worker

    assert "if self._weight_update_active:" in inspect.getsource(Worker._start_weight_update)
    assert not any("abort" in name or "cancel" in name for name in vars(Worker))
    assert hasattr(Worker, "graft_push"), "the start-up hook did not patch the worker"


def test_an_error_of_one_worker_still_leaves_the_answers_of_others_unread():
    """`Receiver.answer` may raise when this fails."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    loop = inspect.getsource(MultiprocExecutor.collective_rpc).split("for mq in response_mqs")[1]
    assert "raise RuntimeError" in loop.split("responses.append")[0]


def test_batch_invariance_is_switched_on_without_arguments_and_only_if_asked_for(monkeypatch):
    from vllm.model_executor.determinism import batch_invariant

    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    switched = []
    monkeypatch.setattr(
        batch_invariant, "enable_batch_invariant_mode", lambda: switched.append(True)
    )
    _vllm_cuda.switch_on_batch_invariance()
    assert not switched
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    for others in ("resolve_tuned_matmul_configs", "override_envs_for_invariance"):
        monkeypatch.setattr(batch_invariant, others, lambda: None)
    _vllm_cuda.switch_on_batch_invariance()
    assert switched


def test_servers_still_mount_routers_in_one_place_before_the_authentication():
    from vllm.entrypoints.launchers import app
    from vllm.entrypoints.launchers.api_server import routers
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

    assert list(inspect.signature(routers.register_api_routers).parameters)[:2] == ["args", "app"]
    assert hasattr(routers.register_api_routers, "__wrapped__"), "the hook did not patch it"
    source = inspect.getsource(app.build_app)
    mounted = source.index("register_api_routers(args, app")
    assert mounted < source.index("init_entrypoints_middleware(args, app")
    assert "/v1" in GUARDED_PREFIX


def test_vllms_own_update_routes_still_lie_outside_the_guarded_paths():
    """Graft's routes can go when vLLM's ask for the API key and need no development mode."""
    from vllm.entrypoints.launchers.api_server import routers
    from vllm.entrypoints.rl.online.api_router import router
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

    paths = [route.path for route in router.routes]
    assert "/update_weights" in paths
    assert not any(path.startswith(GUARDED_PREFIX) for path in paths)
    source = inspect.getsource(inspect.unwrap(routers.register_api_routers))
    assert source.index("VLLM_SERVER_DEV_MODE") < source.index("register_rl_api_routers")


def test_config_parsers_can_be_registered_and_are_told_the_overrides():
    from vllm.transformers_utils import config

    from vllm_graft.serve._vllm_config import register_parser
    from vllm_graft.serve.own_config import FORMAT
    from vllm_graft.serve.registry import factory_of

    register_parser(factory_of)
    assert FORMAT in config._CONFIG_FORMAT_TO_CONFIG_PARSER
    assert "hf_overrides=" in inspect.getsource(config.get_config)


def test_a_model_config_says_whether_it_plans_a_latent_cache():
    from vllm.config import ModelConfig

    assert isinstance(ModelConfig.use_mla, property)
    assert "VLLM_MLA_DISABLE" in inspect.getsource(ModelConfig.use_mla.fget)


def test_the_cpu_backend_still_plans_in_a_builder_from_common_metadata():
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    build = inspect.signature(CPUAttentionMetadataBuilder.build).parameters
    assert list(build)[1:3] == ["common_prefix_len", "common_attn_metadata"]
    fields = {f.name for f in dataclasses.fields(CommonAttentionMetadata) if f.init}
    assert fields >= {
        "query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "max_query_len",
        "block_table_tensor", "causal",
    }  # fmt: skip
    backend = _vllm_cpu.exact_backend()
    assert issubclass(backend.get_builder_cls(), CPUAttentionMetadataBuilder)
    assert backend.get_name() == "CPU_ATTN"


def test_packed_products_are_there_for_float32_and_for_bf16_where_the_processor_has_them():
    assert _vllm_packed.packs(torch.float32)
    assert _vllm_packed.packs(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_give_a_row_the_same_bits_in_any_batch(dtype):
    if not _vllm_packed.packs(dtype):
        pytest.skip(f"no packed products in {dtype} on this processor")
    kernel = _vllm_packed.OneDnn(exact=False)
    weight, x = torch.randn(96, 64).to(dtype), torch.randn(33, 64).to(dtype)
    copy = kernel.pack([weight])
    [whole] = kernel.multiply(x, None, copy.handle, [96])
    torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight))
    for rows in range(1, 34):
        [got] = kernel.multiply(x[:rows], None, copy.handle, [96])
        assert torch.equal(got, whole[:rows]), rows
    if dtype == torch.bfloat16:
        assert torch.equal(whole, torch.nn.functional.linear(x, weight))


def test_the_norm_kernel_takes_whole_vectors_of_float32():
    """`_C.rms_norm`; its bf16 form cuts numbers off where the processor has no bf16."""
    kernel = _vllm_cpu.rms_norm_kernel()
    assert kernel is not None
    x, weight = torch.randn(5, 48), torch.randn(48)
    for given in (weight, None):
        want = torch.nn.functional.rms_norm(
            x.double(), (48,), None if given is None else given.double(), 1e-5
        )
        assert relative_error(kernel(x, given, 1e-5), want) < 1e-6  # 48 squares in float32


def test_the_attention_kernel_asks_for_amx_tiles_before_anything_else_has():
    """Where the processor has none this only shows that the kernel runs first in a process."""
    code = (
        "import torch\n"
        "from vllm_graft.attention.kernels import AttentionSpec\n"
        "from vllm_graft.serve._vllm_cpu import paged_attention\n"
        "q = torch.ones(40, 2, 64, dtype=torch.bfloat16)\n"
        "kv = torch.ones(40, 1, 64, dtype=torch.bfloat16)\n"
        "ends = torch.tensor([0, 40], dtype=torch.int32)\n"
        "print('equal', paged_attention(q, kv, kv, ends, AttentionSpec(scale=0.125)).unique())"
    )
    assert "equal tensor([1.]" in python(code).stdout


def test_cpu_ranks_have_mapped_their_memory_when_its_names_are_removed():
    """`unlink_when_shared` needs the name before, and every rank's mapping behind it."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Shared

    made = inspect.getsource(Shared.__init__)
    assert made.index("self.group_name = ") < made.index("self._init_cpu_shm()")
    mapping = inspect.getsource(Shared._init_cpu_shm)
    assert mapping.index("init_shm_manager") < mapping.index("join_shm_manager")
    assert "barrier" in mapping[mapping.index("join_shm_manager") :]


def test_a_body_that_must_not_compile_is_asked_at_every_call():
    """`_vllm.never_compile` sets `do_not_compile` after the engine has built the body."""
    from vllm.compilation import decorators

    source = inspect.getsource(decorators)
    call = source[source.index("def __call__(self") :]
    assert call.index("self.do_not_compile") < call.index("aot_compiled_fn")
