"""What `sae-factory doctor` looks at: one function a question, each giving `Finding`s and raising nothing.

A finding says what was found, whether that is well ("ok"), keeps something from working ("warn") or keeps everything
from working ("fail"), and then what to do. Whatever asks a network is given `ANSWER_S` and no more; keys and tokens are
used to ask who they belong to, and never shown.
"""

from __future__ import annotations

import importlib
import importlib.util
import netrc
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from dictionary_learning import __version__

Status = Literal["ok", "warn", "fail"]
ANSWER_S = 5.0  # for an account's server, whatever hangs (a name server has no timeout of its own)
DISTRIBUTION = "sae-factory"
PYTHONS = ((3, 11), (3, 13))  # from the first on, below the second
ESSENTIAL = {  # module -> its distribution
    **{
        name: name
        for name in ("torch", "numpy", "nnsight", "transformers", "datasets", "huggingface_hub", "tokenizers")
    },
    **{name: name for name in ("safetensors", "pyarrow", "pydantic", "tyro", "rich", "tqdm", "scipy")},
    "yaml": "pyyaml",
}
EXTRAS = {  # module -> (the extra that brings it, what does not work without it)
    "wandb": ("wandb", "--use_wandb and `sae-factory sync`"),
    "sentence_transformers": ("sentence", "sentence encoders (--preset sentence)"),
    "matplotlib": ("report", "plots"),
    "pynvml": ("gpu", "--max_temperature on a GPU"),
}
DISK_GB, MEMORY_GB, WRITE_MB_S = 5.0, 4.0, 50.0  # below which a run of the demo may meet its limits
PUBLIC_MODEL = "openai-community/gpt2"  # to ask the Hub for, who is not logged in
WRITTEN = 64 << 20  # bytes, to measure by


class Finding(NamedTuple):
    """One line: its group, what was looked at, whether it is well, what was found, and the remedy if it is not."""

    group: str
    name: str
    status: Status
    found: str
    remedy: str = ""


class NoAnswer(Exception):
    """A question took longer than `ANSWER_S`."""


def within(seconds: float, question: Callable[[], Any]) -> Any:
    """What `question()` gives or raises. Raises NoAnswer when that takes longer; the question is then abandoned."""
    answers: list[tuple[bool, Any]] = []

    def ask() -> None:
        try:
            answers.append((True, question()))
        except BaseException as error:  # noqa: BLE001 - also SystemExit, which some clients raise; for whoever waits
            answers.append((False, error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise NoAnswer(f"no answer within {seconds:.0f} s")
    fine, answer = answers[0]
    if not fine:
        raise answer
    return answer


def plain(value: object, *secrets: str | None) -> str:
    """One printable line of what an error or a server says, without the secrets, and without those of addresses."""
    text = re.sub(r"(://)[^/@\s]+@", r"\1***@", " ".join(str(value).split()))
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return "".join(c if c.isprintable() else "?" for c in text)[:300].rstrip(".")


# ------------------------------------------------------------------------------------------- versions


def versions() -> Iterator[Finding]:
    """This program, Python, what it needs, and known trouble between versions."""
    group, here = "versions", sys.version_info[:2]
    low, high = (".".join(map(str, version)) for version in PYTHONS)
    fits = PYTHONS[0] <= here < PYTHONS[1]
    remedy = "" if fits else f"use Python {low} or newer, below {high}"
    yield Finding(group, DISTRIBUTION, "ok", f"{__version__}, in {Path(__file__).parent}")
    yield Finding(group, "python", "ok" if fits else "fail", platform.python_version(), remedy)
    ranges = _required_ranges()
    for module, distribution in ESSENTIAL.items():
        yield _essential(group, module, distribution, ranges.get(distribution.replace("_", "-").lower()))
    trouble = _torchvision_trouble()
    if trouble:
        yield Finding(group, "torchvision", "warn", trouble, "uninstall it (nothing here needs it), or install torch's")


def _essential(group: str, module: str, distribution: str, wanted: Any) -> Finding:
    try:
        importlib.import_module(module)
        version = metadata.version(distribution)
    except Exception as error:  # noqa: BLE001 - a package can fail to import in any way
        why = plain(f"{type(error).__name__}: {error}")
        named = error.name if isinstance(error, ModuleNotFoundError) else None  # itself, or what it imports
        missing = (named or module).partition(".")[0]
        remedy = f"pip install '{distribution if missing == module else ESSENTIAL.get(missing, missing)}'"
        return Finding(group, distribution, "fail", f"can't be imported ({why})", remedy)
    if wanted is not None and not wanted.contains(version, prereleases=True):
        return Finding(group, distribution, "warn", version, f"pip install '{distribution}{wanted}'")
    return Finding(group, distribution, "ok", version)


def _required_ranges() -> dict[str, Any]:
    """Distribution -> the versions that this package was made for ({} where it runs from a folder, not installed)."""
    try:
        from packaging.requirements import Requirement

        needed = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except (ImportError, metadata.PackageNotFoundError):
        return {}
    return {r.name.replace("_", "-").lower(): r.specifier for r in needed if "extra" not in str(r.marker or "")}


def _torchvision_trouble() -> str:
    """A torchvision that was built for another torch breaks every import of transformers' image models."""
    try:
        metadata.version("torchvision")
        importlib.import_module("torchvision")
    except metadata.PackageNotFoundError:
        return ""
    except Exception as error:  # noqa: BLE001
        return plain(f"built for another torch: {error}")
    return ""


# ------------------------------------------------------------------------------------------- devices


def devices() -> Iterator[Finding]:
    """CPU, GPUs, and what several of them need."""
    import torch

    group, cores = "devices", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = cpu_flags()
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    threads = torch.get_num_threads()
    of_torch = f"torch uses {threads} thread{'' if threads == 1 else 's'}"
    found = ", ".join([_cpu_name(), f"{cores} cores", of_torch, *fast])
    if threads > cores:
        yield Finding(group, "CPU", "warn", found, f"set OMP_NUM_THREADS={cores}: more threads than cores slow it down")
    else:
        yield Finding(group, "CPU", "ok", found)
    yield from _cuda(group)
    if torch.backends.mps.is_available():
        yield Finding(group, "MPS", "ok", "Apple's GPU is there (--device mps)")
    if torch.distributed.is_available():
        backends = [n for n, there in (("Gloo", torch.distributed.is_gloo_available()), ("NCCL", _nccl())) if there]
        yield Finding(group, "several ranks", "ok", f"torchrun with {' and '.join(backends)}")
    else:
        yield Finding(group, "several ranks", "warn", "this torch has no distributed package", "install another build")


def _cuda(group: str) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if torch.version.cuda is not None and visible is not None:
            found = f"CUDA_VISIBLE_DEVICES='{plain(visible)}' leaves torch no GPU"
            yield Finding(group, "CUDA", "warn", found, "unset it, or name GPUs that `nvidia-smi -L` lists")
        elif torch.version.cuda is not None:
            remedy = "install a driver for it (nvidia-smi shows the present one), or torch's CPU build"
            yield Finding(group, "CUDA", "warn", f"torch was built for CUDA {torch.version.cuda}, finds no GPU", remedy)
        elif shutil.which("nvidia-smi"):
            remedy = "install torch's CUDA build: see pytorch.org/get-started"
            yield Finding(group, "CUDA", "warn", "there is an NVIDIA driver, but torch is a CPU build", remedy)
        else:
            yield Finding(group, "CUDA", "ok", "none: everything runs on the CPU, larger models slowly")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = f"{facts.name}, {total / 1e9:.0f} GB ({free / 1e9:.0f} free), compute {facts.major}.{facts.minor}"
        found += f", CUDA {torch.version.cuda}, driver {_driver()}"
        if free < total / 2:
            remedy = f"another process holds its memory: end it, or take another GPU than cuda:{index}"
            yield Finding(group, f"cuda:{index}", "warn", found, remedy)
        else:
            yield Finding(group, f"cuda:{index}", "ok", found)
    if importlib.util.find_spec("triton") is None:
        yield Finding(group, "triton", "warn", "absent: steps run on slower kernels", "pip install triton")
    if torch.cuda.device_count() > 1 and not _nccl():
        yield Finding(group, "NCCL", "warn", "absent", "several GPUs need it: install torch's CUDA build for Linux")


def _nccl() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_nccl_available()


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # noqa: BLE001 - the package is optional, and a driver may not answer
        return "unknown (pip install 'sae-factory[gpu]' to see it)"


def cpu_flags() -> set[str]:
    """Instruction sets that Linux says the CPU has (nothing elsewhere)."""
    return set(_cpuinfo("flags").split())


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


# ------------------------------------------------------------------------------------------- accounts


def accounts() -> Iterator[Finding]:
    """Who is logged in at the Hub and at Weights & Biases."""
    yield _hub()
    yield _wandb()


def _hub() -> Finding:
    group, name = "accounts", "Hugging Face Hub"
    offline = next((v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _switched_on(v)), None)
    if offline:
        return Finding(group, name, "warn", f"{offline} forbids the network", f"unset {offline} to load from the Hub")
    token = None
    try:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import get_session

        token = get_token()
        if not token:
            answer = within(ANSWER_S, lambda: get_session().get(f"{constants.ENDPOINT}/api/models/{PUBLIC_MODEL}"))
            if answer.status_code >= 500:
                answer.raise_for_status()
            remedy = "set HF_TOKEN or run `hf auth login`"
            return Finding(group, name, "warn", "reached, not logged in: gated models and pushes won't work", remedy)
        who = within(ANSWER_S, lambda: HfApi(token=token).whoami())
        return Finding(group, name, "ok", f"logged in as {plain(who['name'], token)}")
    except NoAnswer as error:
        return Finding(group, name, "warn", plain(error), "check the network, or HF_ENDPOINT")
    except BaseException as error:  # noqa: BLE001
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            remedy = "set a valid HF_TOKEN or run `hf auth login`"
            return Finding(group, name, "warn", f"the token is not accepted (HTTP {status})", remedy)
        why = plain(f"{type(error).__name__}: {error}", token)
        return Finding(group, name, "warn", f"not reached ({why})", "check the network, or HF_ENDPOINT")


def _wandb() -> Finding:
    group, name = "accounts", "Weights & Biases"
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return Finding(group, name, "warn", f"WANDB_MODE is {plain(mode)}", "unset it to log live, or sync later")
    key = _wandb_key()
    try:
        wandb = importlib.import_module("wandb")
    except Exception:  # noqa: BLE001 - its own line says so
        return Finding(group, name, "warn", "the package is not there", "pip install 'sae-factory[wandb]'")
    if not key:
        return Finding(group, name, "warn", "not logged in", "set WANDB_API_KEY or run `wandb login`")
    try:
        who = within(ANSWER_S, lambda: wandb.Api(timeout=int(ANSWER_S), api_key=key).viewer.username)
        return Finding(group, name, "ok", f"logged in as {plain(who, key)}")
    except BaseException as error:  # noqa: BLE001
        why = plain(f"{type(error).__name__}: {error}", key)
        return Finding(group, name, "warn", f"not reached ({why})", "check the network and the key (`wandb login`)")


def _wandb_key() -> str | None:
    """From the environment, or from where `wandb login` keeps it."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        entry = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        entry = None
    return os.environ.get("WANDB_API_KEY") or (entry[2] if entry else None)


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


# ------------------------------------------------------------------------------------------- room


def room(folder: Path) -> Iterator[Finding]:
    """Memory, the disk of `folder` and how fast it is written, and the cache of the Hub."""
    group, memory = "room", free_memory()
    if memory is not None:
        enough = memory >= MEMORY_GB * 1e9
        remedy = "" if enough else "lower --buffer_contexts and --widths, or end other programs"
        yield Finding(group, "memory", "ok" if enough else "warn", f"{memory / 1e9:.1f} GB free", remedy)
    yield _disk(group, folder)
    yield _writing(group, folder)
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")).expanduser()
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        yield Finding(group, "Hub cache", "warn", f"{cache} can't be written", "set HF_HOME to a folder that can be")
    else:
        remedy = "" if free >= DISK_GB * 1e9 else "free some space, or set HF_HOME to another disk"
        yield Finding(group, "Hub cache", "warn" if remedy else "ok", f"{free / 1e9:.1f} GB free at {cache}", remedy)


def _disk(group: str, folder: Path) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(group, "disk", "fail", f"{folder}: {error.strerror}", "give an existing --folder")
    remedy = "" if free >= DISK_GB * 1e9 else "free some space: a saved state holds all dictionaries three times"
    return Finding(group, "disk", "warn" if remedy else "ok", f"{free / 1e9:.1f} GB free at {folder}", remedy)


def _writing(group: str, folder: Path) -> Finding:
    data = os.urandom(1 << 20)
    try:
        began = time.perf_counter()
        with tempfile.TemporaryFile(dir=folder) as handle:
            for _ in range(WRITTEN // len(data)):
                handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        speed = WRITTEN / 1e6 / (time.perf_counter() - began)
    except OSError as error:
        found = f"nothing can be written to {folder} ({error.strerror})"
        return Finding(
            group, "writing", "fail", found, "give a --folder that can be written, as your --save_dir must be"
        )
    slow = speed < WRITE_MB_S
    remedy = "save states less often (--state_every), or to another disk" if slow else ""
    return Finding(group, "writing", "warn" if slow else "ok", f"{speed:,.0f} MB/s", remedy)


def free_memory() -> int | None:
    """Bytes that programs may still take: of the machine, and of the container where it has a limit; None: unknown."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        within_limit = max(0, int(limit.read_text()) - int(used.read_text()))
        return within_limit if free is None else min(free, within_limit)
    return free


# ------------------------------------------------------------------------------------------- extras


def extras() -> Iterator[Finding]:
    """Optional packages; where there is no GPU, not what is for one."""
    import torch

    for module, (extra, without) in EXTRAS.items():
        try:
            importlib.import_module(module)
        except Exception:  # noqa: BLE001
            if extra == "gpu" and not torch.cuda.is_available():
                continue
            remedy = f"pip install 'sae-factory[{extra}]'"
            yield Finding("extras", extra, "warn", f"not installed: {without} won't work", remedy)
        else:
            yield Finding("extras", extra, "ok", "installed")
