"""The build: one OpenMP runtime, no instruction set leaking into another, a package that works without a compiler."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from emulated import HOST_FLAGS, host_compiler
from setup_script import setup_script
from setuptools import Distribution

from fastattn import _extension

ROOT = Path(__file__).resolve().parent.parent
needs_extension = pytest.mark.skipif(_extension.extension is None, reason=str(_extension.missing_reason))


# An editable installation finds fastattn._C for any package called fastattn; the tests mean the package in `cwd` alone.
ONLY_HERE = 'import sys; sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]\n'


def run_python(code: str, cwd: Path, stream: str = "stdout") -> str:
    command = [sys.executable, "-c", ONLY_HERE + code]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return getattr(result, stream)


def copy_package(target: Path) -> None:
    """The Python files of the package alone, as an installation without a compiler has them."""
    ignored = shutil.ignore_patterns("*.so", "_build*", "__pycache__")
    shutil.copytree(ROOT / "fastattn", target / "fastattn", ignore=ignored)


def copy_sources(target: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    copy_package(target)
    shutil.copytree(ROOT / "csrc", target / "csrc")


@needs_extension
@pytest.mark.parametrize("changed", ["ops.cpp", "layer_norm/layer_norm_bindings.cpp", "an older build's report", None])
def test_a_stale_extension_is_not_loaded_and_says_what_to_do(tmp_path, changed):
    copy_sources(tmp_path)
    built = Path(_extension.extension.__file__)
    (tmp_path / "fastattn" / built.name).symlink_to(built)
    report = json.loads(built.with_name("_build_report.json").read_text())
    if changed is not None and (tmp_path / "csrc" / changed).exists():
        with (tmp_path / "csrc" / changed).open("a") as source:
            source.write("// pulled\n")
    elif changed is not None:
        del report["interface"]
    (tmp_path / "fastattn" / "_build_report.json").write_text(json.dumps(report))
    code = "import fastattn; print(fastattn.available_backends()['cpu'])"
    message = run_python(code, tmp_path).strip()
    if changed is None:
        assert message == "None"
    else:
        assert message.startswith("the compiled extension was built before csrc changed; build it again with `make")
        assert run_python(code, tmp_path, "stderr").count("UserWarning: fastattn runs on PyTorch alone") == 1


@needs_extension
def test_an_installed_extension_is_not_compared_with_sources(tmp_path):
    copy_package(tmp_path)
    built = Path(_extension.extension.__file__)
    (tmp_path / "fastattn" / built.name).symlink_to(built)
    (tmp_path / "fastattn" / "_build_report.json").write_text(json.dumps({"built": True, "interface": "another"}))
    assert run_python("import fastattn; print(fastattn.available_backends()['cpu'])", tmp_path).strip() == "None"


@needs_extension
@pytest.mark.parametrize("built_for, loads", [("1.9.1", False), ("cuda", True)])
def test_an_extension_of_another_torch_is_not_loaded_and_says_so(tmp_path, built_for, loads):
    """Its symbols may be missing, or be there and mean something else."""
    copy_package(tmp_path)
    built = Path(_extension.extension.__file__)
    (tmp_path / "fastattn" / built.name).symlink_to(built)
    built_for = torch.__version__.split("+")[0] + "+cu999" if loads else built_for
    (tmp_path / "fastattn" / "_build_report.json").write_text(json.dumps({"built": True, "torch": built_for}))
    printed = run_python("import fastattn; print(fastattn.available_backends()['cpu'])", tmp_path).strip()
    said = f"the compiled extension was built for torch 1.9.1, and this is torch {torch.__version__}; install fastattn"
    assert printed == "None" if loads else printed.startswith(said)


def run_setup(folder: Path, *command: str, compiler: str | None = None) -> None:
    environment = os.environ | ({"CXX": compiler} if compiler else {})
    command = (sys.executable, "setup.py", "-q", *command)
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True, timeout=240)


@needs_extension
def test_process_has_one_openmp_runtime():
    if not Path("/proc/self/maps").exists():
        pytest.skip("/proc/self/maps is Linux's")
    code = """
import torch, fastattn
fastattn.layer_norm(torch.randn(64, 512), (512,))
libraries = {line.split()[-1] for line in open("/proc/self/maps")}
print(sum(any(name in library for name in ("libgomp", "libomp", "libiomp")) for library in libraries))
"""
    assert run_python(code, ROOT).strip() == "1"


@needs_extension
def test_extension_is_linked_to_no_openmp_runtime():
    """It uses the one that torch is linked to, whichever that is and whatever the compiler's own would be."""
    library = Path(_extension.extension.__file__).read_bytes()
    assert b"GOMP_parallel" in library
    assert re.findall(rb"lib(?:g|i|)omp[-\w.]*\.so", library) == []


@needs_extension
def test_isa_builds_share_no_code():
    """The linker keeps one copy of a weak symbol (an inline function that was not inlined). Outside the build's own
    namespace that copy could be AVX-512 code, serving a machine that has none."""
    objects = sorted((ROOT / "build" / "ninja" / f"torch-{torch.__version__}").rglob("*_cpu.*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the build folder of an in-place build, and nm")
    for path in objects:
        isa = path.suffixes[-2].lstrip(".")
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for line in listing.splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            # A pointer to the C++ runtime, not code.
            if name == "DW.ref.__gxx_personality_v0":
                continue
            assert kind not in "WVu" or f"isa_{isa}::" in name, f"{path.name} exports shared inline code: {name}"


def includes_torch(header: Path) -> bool:
    text = header.read_text()
    ours = [ROOT / "csrc" / name for name in re.findall('#include "(.*)"', text)]
    return re.search("#include <(ATen|c10|pybind11|torch)/", text) is not None or any(map(includes_torch, ours))


def find_clang() -> str | None:
    """Of the versions that are known to compile the kernels. Debian's have theirs in the name."""
    for name in filter(shutil.which, ["clang++", *(f"clang++-{version}" for version in range(19, 30))]):
        version = subprocess.run([name, "-dumpversion"], capture_output=True, text=True).stdout
        if int(version.partition(".")[0] or 0) >= 19:
            return name
    return None


AVX512_BF16 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni",
               "-mavx512bf16"]  # fmt: skip


@pytest.mark.parametrize("pattern, fewest", [("*.h", 40), ("*.cuh", 50)])
@pytest.mark.parametrize("compiler", [host_compiler(), find_clang()], ids=["host", "clang"])
def test_headers_agree_and_define_nothing_that_two_sources_may_not(tmp_path, compiler, pattern, fewest):
    """All in one source: no two mean different things by a name, and none makes a symbol that the linker would find
    twice. GCC keeps a constexpr specialisation of a variable template to its source, as Clang does not."""
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("needs the compiler (of Clang 19 or newer), and nm")
    headers = [path for path in sorted((ROOT / "csrc").rglob(pattern)) if not includes_torch(path)]
    if pattern == "*.h":
        # Those of the emulator take the names of CUDA's intrinsics.
        headers = [path for path in headers if path.parent.name != "emulator"]
    assert len(headers) > fewest
    has_avx512 = platform.machine().lower() in ("x86_64", "amd64")
    flags = [*HOST_FLAGS, "-DFASTATTN_ISA=isa", *(AVX512_BF16 if has_avx512 and pattern == "*.h" else [])]
    command = [*shlex.split(compiler), *flags, "-w", "-x", "c++", "-c", "-", "-o", tmp_path / "all.o"]
    source = "".join(f'#include "{path}"\n' for path in headers)
    compiled = subprocess.run(command, input=source, text=True, capture_output=True)
    assert compiled.returncode == 0, compiled.stderr
    symbols = subprocess.run(["nm", "-C", "--defined-only", tmp_path / "all.o"], capture_output=True, text=True).stdout
    # Capitals are what other objects see; V, W and u may be in several.
    assert not [line for line in symbols.splitlines() if re.search(" [A-UX-Z] ", line)]


def test_package_without_extension_runs_eager_and_says_why(tmp_path):
    copy_package(tmp_path)
    (tmp_path / "fastattn" / "_build_report.json").write_text(json.dumps({"built": False, "reason": "no compiler"}))
    code = """
import torch, fastattn
q = torch.randn(1, 2, 5, 8)
torch.testing.assert_close(fastattn.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))
torch.testing.assert_close(fastattn.layer_norm(q, (8,)), torch.nn.functional.layer_norm(q, (8,)))
fastattn.int8_linear(q, *fastattn.quantize_int8(torch.randn(3, 8)))
print(fastattn.available_backends()["cpu"])
print(fastattn.explain("attention", q, q, q))
"""
    warning = "fastattn runs on PyTorch alone (backend 'eager'): the compiled extension is missing: no compiler"
    said = run_python("import fastattn", tmp_path, "stderr")
    # Of the user's own line, not of one in the package.
    assert warning in said and "fastattn/" not in said
    printed = run_python(code, tmp_path)
    assert "the compiled extension is missing: no compiler" in printed.splitlines()[0]
    assert "eager" in printed


def test_a_fresh_checkout_says_what_to_do(tmp_path):
    copy_package(tmp_path)
    said = run_python("import fastattn", tmp_path, "stderr")
    assert "the compiled extension is missing: it was not built here; run `make build`, or `python setup.py" in said


@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/c++"])
def test_failing_compiler_leaves_a_package_that_says_so(tmp_path, compiler):
    copy_sources(tmp_path)
    run_setup(tmp_path, "build_ext", "--inplace", compiler=compiler)
    printed = run_python("import fastattn; print(fastattn.available_backends()['cpu'])", tmp_path)
    assert "the C++ compiler failed (" in printed
    if compiler != "/bin/false":
        assert "/nonexistent/c++: " in printed
    log = Path(printed.rpartition(" are in ")[2].strip())
    assert log.is_absolute() and log.exists()


def test_a_system_other_than_linux_gets_a_package_that_says_so(tmp_path):
    copy_sources(tmp_path)
    pretend = "import platform, runpy, sys, torch; platform.system = lambda: 'Darwin'"
    build = "sys.argv[1:] = ['build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    run_python(f"{pretend}; {build}", tmp_path)
    printed = run_python("import fastattn; print(fastattn.available_backends()['cpu'])", tmp_path)
    assert printed.strip().endswith("missing: the kernels are built on Linux alone, and this is Darwin")


def test_sdist_has_all_that_it_is_built_from(tmp_path):
    copy_sources(tmp_path)
    # Of a build in place, which says something of its machine alone.
    (tmp_path / "fastattn" / "_build_report.json").write_text("{}")
    run_setup(tmp_path, "sdist")
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    wanted = [path for folder in ("csrc", "fastattn") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(wanted) > 200
    missing = {path.relative_to(tmp_path).as_posix() for path in wanted} - packed
    assert missing == {"fastattn/_build_report.json"}


def test_a_package_has_no_modules_that_an_earlier_build_left(tmp_path, monkeypatch):
    """As after a pull that takes one away: the next `pip install .` would install it again."""
    (tmp_path / "fastattn").mkdir()
    (tmp_path / "fastattn" / "__init__.py").touch()
    (tmp_path / "old" / "fastattn").mkdir(parents=True)
    (tmp_path / "old" / "fastattn" / "gone.py").touch()
    monkeypatch.chdir(tmp_path)
    command = setup_script().FreshPackage(Distribution({"packages": ["fastattn"], "script_name": "setup.py"}))
    command.build_lib = "old"
    command.ensure_finalized()
    command.run()
    assert [path.name for path in (tmp_path / "old" / "fastattn").iterdir()] == ["__init__.py"]


@pytest.mark.parametrize("jobs, asked", [(None, []), ("", []), ("3", ["-j", "3"])])
def test_max_jobs_limits_the_compilers(tmp_path, monkeypatch, jobs, asked):
    build = setup_script()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "write_ninja_file", lambda *arguments: None)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    if jobs is not None:
        monkeypatch.setenv("MAX_JOBS", jobs)
    commands = []
    run = lambda command, **options: commands.append(command) or subprocess.CompletedProcess(command, 0)  # noqa: E731
    monkeypatch.setattr(build.subprocess, "run", run)
    command = build.NinjaBuild(Distribution())
    assert command.run_ninja(tmp_path / "_C.so", torch, None) is None
    assert commands[0][3:] == asked


@pytest.mark.parametrize("jobs", ["0", "-2", "many"])
def test_max_jobs_must_be_a_number(monkeypatch, jobs):
    build = setup_script()
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(build.BuildFailure, match=f"MAX_JOBS must be a number .*, got '{jobs}'"):
        build.ninja_jobs()


@pytest.fixture
def make(tmp_path):
    """`make` in a tree without git, whose .venv was made elsewhere: the scripts of tools begin with a Python that is
    gone, and write their arguments to `said`."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    tools = tmp_path / ".venv" / "bin"
    for folder in (tools, tmp_path / "csrc", tmp_path / "tests", tmp_path / "fastattn"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "csrc/a.cpp", "tests/b.cuh", "fastattn/__init__.py", "said",
                 "requirements.txt", "requirements-data.txt", "requirements-peers.txt",
                 ".venv/.installed"):  # fmt: skip
        (tmp_path / name).touch()
    note = "import sys; print(*sys.argv, file=open('said', 'a', encoding='utf-8'))\n"
    for name in ("clang-format", "mypy"):
        (tools / name).write_text(f"#!/gone/bin/python\n{note}")
    (tools / "ruff").write_text('#!/bin/sh\necho "$0" "$@" >> said\n')
    # pip has nothing to do.
    (tools / "python").write_text(
        '#!/bin/sh\ncase "$2" in pip) echo "$@" >> said; exit;; esac\n'
        f'PYTHONPATH=. exec {shlex.quote(sys.executable)} "$@"\n'
    )
    for name in ("clang-format", "mypy", "ruff", "python"):
        (tools / name).chmod(0o755)

    def run(*arguments: str) -> list[str]:
        (tmp_path / "said").write_text("")
        # Whoever reads its standard input waits for ever.
        with subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE) as silence:
            command = ["make", "-f", ROOT / "Makefile", *arguments]
            outcome = subprocess.run(command, cwd=tmp_path, stdin=silence.stdout, capture_output=True, text=True)
            silence.kill()
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        return (tmp_path / "said").read_text().splitlines()

    return run


def test_lint_names_the_sources_without_git_and_runs_in_a_checkout_that_moved(make):
    assert make("lint") == [
        ".venv/bin/ruff check .", ".venv/bin/ruff format --check .",
        ".venv/bin/clang-format --dry-run --Werror csrc/a.cpp tests/b.cuh", ".venv/bin/mypy",
    ]  # fmt: skip


@pytest.mark.parametrize("built", [True, False])
def test_make_builds_again_where_nothing_was_built(make, tmp_path, built):
    """Whoever lacked a compiler, and has installed one, finds `make build` doing what the message asks for."""
    text = f"extension = {built}\nmissing_reason = {None if built else 'no compiler'!r}\n"
    (tmp_path / "fastattn" / "_extension.py").write_text(text)
    assert len(make("build")) == 1
    assert len(make("build")) == (0 if built else 1)


def tiny_build(folder: Path, compiler: str | None = None) -> tuple[dict, str]:
    """Builds one kernel and one file of glue that include a header in ``folder``; returns the report and what ninja
    was asked to do. The library lacks its module, and is not loaded."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "fastattn").mkdir()
    for name in ("__init__.py", "_interface.py"):
        shutil.copy(ROOT / "fastattn" / name, folder / "fastattn")
    (folder / "csrc" / "common").mkdir(parents=True)
    (folder / "csrc" / "common" / "tiny.h").write_text("int tiny();\n")
    for name in ("tiny.cpp", "tiny_cpu.cpp"):
        (folder / "csrc" / name).write_text('#include "common/tiny.h"\nstatic_assert(__cplusplus >= 202002L);\n')
    run_setup(folder, "build_ext", "--inplace", compiler=compiler)
    (ninja_file,) = folder.glob("build/ninja/*/build.ninja")
    return json.loads((folder / "fastattn" / "_build_report.json").read_text()), ninja_file.read_text()


@needs_extension
def test_builds_in_a_folder_whose_name_holds_spaces(tmp_path):
    folder = tmp_path / "my own 'clone'"
    folder.mkdir()
    report, _ = tiny_build(folder)
    assert report["built"], report["reason"]


@needs_extension
def test_a_compiler_without_avx512_builds_the_rest(tmp_path):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("there is one instruction set to build for")
    compiler = tmp_path / "old_compiler"
    known = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-mavx512*) exit 1;; esac\nexec {known} "$@"\n')
    compiler.chmod(0o755)
    report, asked = tiny_build(tmp_path, str(compiler))
    assert report["built"], report["reason"]
    assert "FASTATTN_BUILD_AVX2=1" in asked and "-mavx512" not in asked


@needs_extension
def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set 'avx1024'"):
        _extension.extension.set_cpu_isa("avx1024")
