"""Registrations: names of factories, the record in the environment, refusals."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from tests.support import python
from vllm_graft.serve import registry
from vllm_graft.serve.importing import Importable, UnnameableError, locate, name_of
from vllm_graft.serve.registry import RegistrationError, factory_of, register, registrations


def build_it(vllm_config, parallel_context):
    return "built"


class Holder:
    @staticmethod
    def build(vllm_config, parallel_context):
        return "held"

    def method(self, vllm_config, parallel_context): ...


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv(registry.ENV, "{}")
    monkeypatch.setattr(registry, "_LOCAL", {})
    monkeypatch.setattr(registry, "_REGISTRY", None)


def test_a_function_is_recorded_by_name_for_children(monkeypatch):
    register("A", build_it)
    assert registrations()["A"].target == "tests.unit.test_registry:build_it"
    monkeypatch.setattr(registry, "_LOCAL", {})  # as in a child process
    assert factory_of("A")(None, None) == "built"


def test_nested_names_and_strings():
    register("B", Holder.build)
    register("C", "tests.unit.test_registry:Holder.build")
    assert registrations()["B"].target == registrations()["C"].target
    assert factory_of("C")(None, None) == "held"


def test_a_file_works_without_being_importable(tmp_path):
    (tmp_path / "neighbour.py").write_text("WORD = 'hello'\n")
    (tmp_path / "mine.py").write_text("import neighbour\ndef build(c, p): return neighbour.WORD\n")
    register("D", f"{tmp_path}/mine.py:build")
    assert factory_of("D")(None, None) == "hello"


def test_the_variable_may_be_written_by_hand(monkeypatch):
    monkeypatch.setenv(registry.ENV, '{"ByHand": "tests.unit.test_registry:build_it"}')
    assert factory_of("ByHand")(None, None) == "built"
    register("Too", build_it)
    assert set(registrations()) == {"ByHand", "Too"}


@pytest.mark.parametrize("value", ["nonsense", "[1]", '{"A": 3}', '{"A": {"typo": "x"}}'])
def test_a_malformed_variable_is_shown(value, monkeypatch):
    monkeypatch.setenv(registry.ENV, value)
    with pytest.raises(RegistrationError, match="must be a JSON object of architecture names"):
        registrations()


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        (lambda config, context: None, "is a lambda"),
        (functools.partial(build_it, None), "without a name of its own"),
    ],
)
def test_what_has_no_name_works_here_and_is_refused_for_children(factory, why, monkeypatch):
    register("E", factory)
    assert factory_of("E") is factory
    with pytest.raises(RegistrationError, match=why):
        registry.refuse_children(["E"])
    monkeypatch.setattr(registry, "_LOCAL", {})
    with pytest.raises(RegistrationError, match=f"{why}.*VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        factory_of("E")
    register("E", build_it)
    registry.refuse_children(["E", "Unknown"])


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("no_colon", "expected 'module:attribute'"),
        ("module:", "expected 'module:attribute'"),
        ("no/such/file.py:build", "there is no file"),
        (5, "expected a factory .*got 5"),
    ],
)
def test_malformed_factories_are_refused(factory, text):
    with pytest.raises(RegistrationError, match=f"X: .*{text}"):
        register("X", factory)


def test_an_architecture_needs_a_name():
    with pytest.raises(RegistrationError, match="needs a name, got ''"):
        register("", build_it)


@pytest.mark.parametrize("target", ["no_such_module:build", "tests.unit.test_registry:gone"])
def test_a_name_that_leads_nowhere_says_which(target):
    register("Y", target)
    with pytest.raises(RegistrationError, match=f"Y: cannot import its factory '{target}'"):
        factory_of("Y")


def test_an_unknown_architecture_lists_the_known():
    register("Known", build_it)
    with pytest.raises(RegistrationError, match=r"Z is not registered .*registered: Known"):
        factory_of("Z")


def test_names_in_the_main_script(tmp_path):
    script = tmp_path / "main_script.py"
    script.write_text(
        "from vllm_graft.serve.importing import name_of, UnnameableError\n"
        "def top(): ...\n"
        "if __name__ == '__main__':\n"
        "    def guarded(): ...\n"
        "    print(name_of(top).target)\n"
        "    try: name_of(guarded)\n"
        "    except UnnameableError as why: print(why)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "__main__:top"
    assert "guarded is defined under if __name__ == '__main__'" in second


def test_an_interactive_definition_has_no_name():
    code = (
        "from vllm_graft.serve.importing import name_of\n"
        "def here(): ...\n"
        "try: name_of(here)\n"
        "except Exception as why: print(type(why).__name__, why)"
    )
    assert "UnnameableError here is defined in an interactive session" in python(code).stdout


def test_locate_prefers_the_recorded_file_over_a_namesake(tmp_path):
    (tmp_path / "json.py").write_text("VALUE = 1\n")
    found = locate(Importable(target="json:VALUE", path=str(tmp_path / "json.py")))
    assert found == 1 and json.loads("1") == 1


def test_lambdas_are_unnameable():
    with pytest.raises(UnnameableError):
        name_of(lambda: 0)
    with pytest.raises(TypeError):
        name_of(5)


def test_a_name_that_leads_to_another_object_is_no_name():
    class Shadow:
        def build(self, config, context): ...

    with pytest.raises(UnnameableError, match="inside a function|leads to another object"):
        name_of(Shadow().build)
    with pytest.raises(UnnameableError, match="Holder.method leads to another object"):
        name_of(Holder().method)


def test_a_stock_registration_drops_the_record():
    register("Once", build_it)
    registry.forget("Once")
    registry.forget("Never")
    assert not registrations()
