"""GPUs that this torch cannot use, and what to type so that it can."""

import os
import re
import shutil
import subprocess

import torch

# The oldest driver for a torch built with a CUDA of this number, by NVIDIA's compatibility table.
OLDEST_DRIVER = {"12": 525, "13": 580}


def unused_gpu(name: str, device: torch.device) -> str:
    """Why a setting of auto came to a device without this machine's NVIDIA GPU; "" if it did not.

    With what to type to make torch use the GPU.
    """
    if name != "auto" or device.type == "cuda":
        return ""
    return missing_kernels(0) if torch.cuda.is_available() else refused_gpu()


def missing_kernels(number: int) -> str:
    """Why this torch has no code for a GPU of this machine, and what to type; "" when it has."""
    major, minor = torch.cuda.get_device_capability(number)
    known = [arch.partition("_") for arch in torch.cuda.get_arch_list() if "_" in arch]
    for kind, _, digits in known:
        at = int(re.sub(r"\D.*", "", digits))  # sm_86 and sm_90a run on their generation
        same = kind == "sm" and at // 10 == major and at % 10 <= minor
        if same or (kind == "compute" and at <= 10 * major + minor):
            return ""
    if not known or not torch.version.cuda:  # an AMD GPU, whose kinds have other names
        return ""
    old = 10 * major + minor < min(int(re.sub(r"\D.*", "", digits)) for _, _, digits in known)
    # builds with an older CUDA know older cards, the newest torch knows newer ones
    what = install_torch("cu126") if old else install_torch(version="")
    return (
        f"torch {torch.__version__} has no kernels for the {torch.cuda.get_device_name(number)} "
        f"(compute capability {major}.{minor}); install one that has: {what}"
    )


def refused_gpu() -> str:
    """Why torch does not see this machine's NVIDIA GPU, and what to type; "" when there is none.

    NVIDIA's own program says whether there is one.
    """
    program = shutil.which("nvidia-smi")
    if program is None or torch.version.hip or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            query, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    card, _, driver = said.stdout.partition("\n")[0].partition(", ")
    text = said.stdout + said.stderr
    if said.returncode and ("NVML" in text or "communicate" in text):  # and not: no devices
        why = text.strip().splitlines()[0]
        return f"NVIDIA's driver does not work ({why}); restart, or install the driver anew"
    if said.returncode or not driver:
        return ""
    version = torch.version.cuda
    if not version:
        return (
            f"this torch is built without CUDA and cannot use the {card}; install one that can: "
            f"{install_torch()}"
        )
    oldest = OLDEST_DRIVER.get(version.partition(".")[0], 0)
    if int(re.sub(r"\D.*", "", driver) or 0) < oldest:
        return (
            f"the driver {driver} of the {card} is too old for this torch, whose CUDA {version} "
            f"needs {oldest}; update the driver, or install a torch for it: {install_torch()}"
        )
    return (
        f"torch cannot use the {card} (driver {driver}, CUDA {version}); "
        'python -c "import torch; torch.cuda.init()" says why'
    )


def install_torch(build: str = "auto", version: str = torch.__version__.partition("+")[0]) -> str:
    """What installs this torch anew in another build; auto is the one for the machine's driver."""
    torch_of = f"torch=={version}" if version else "torch"
    command = f"uv pip install --reinstall --torch-backend={build} {torch_of}"
    return f"pip install uv, then {command} (in a virtual environment)"
