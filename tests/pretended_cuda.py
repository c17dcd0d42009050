"""An H100 pretended to PyTorch's CPU build, far enough for Dynamo, autograd and Inductor to make code for fake CUDA tensors.

Nothing can run on it. `pretend` comes before the import of torch, and needs g++. It leans on private names of PyTorch 2.13.
"""

import ctypes
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

PROPERTIES = SimpleNamespace(
    name="pretended",
    major=9,
    minor=0,
    warp_size=32,
    multi_processor_count=132,
    total_memory=80 << 30,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
)


def missing() -> str | None:
    """Why it cannot be pretended here; None if it can."""
    version = importlib.metadata.version("torch")
    if not version.startswith("2.13."):
        return f"PyTorch {version}, and 2.13's private names are used"
    return None if shutil.which("g++") else "no g++"


def _library() -> ctypes.CDLL:
    assert "torch" not in sys.modules, "torch must be imported after pretend()"
    root = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        command = ["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(Path(__file__).with_suffix(".cpp"))]
        command += [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
        subprocess.run([*command, "-o", f"{folder}/pretended.so"], check=True)
        return ctypes.CDLL(f"{folder}/pretended.so", mode=ctypes.RTLD_GLOBAL)


def pretend() -> None:
    """From now on `torch.cuda` says that there is one H100."""
    library = _library()
    import torch
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import joint_graph, post_grad
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    library.register_guard()
    for module, answers in (
        (
            torch.cuda,
            {
                "is_available": True,
                "is_initialized": True,
                "is_current_stream_capturing": False,
                "device_count": 1,
                "current_device": 0,
                "get_device_capability": (9, 0),
                "get_device_properties": PROPERTIES,
                "current_stream": SimpleNamespace(cuda_stream=0),
                "get_rng_state": torch.get_rng_state(),
                "set_rng_state": None,
                "set_device": None,
                "_exchange_device": 0,
                "_maybe_exchange_device": 0,
                "_lazy_init": None,
            },
        ),
        (torch._C, {"_cuda_getDevice": 0, "_cuda_getCurrentRawStream": 0}),
    ):
        for name, answer in answers.items():
            setattr(module, name, lambda *_, answer=answer, **__: answer)
    for name, answer in {
        "is_available": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "device_count": 1,
        "current_device": 0,
        "get_compute_capability": 90,
        "get_device_properties": PROPERTIES,
    }.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer, **__: answer))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: PROPERTIES)
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    joint_graph.lazy_init = post_grad.lazy_init = lambda *_: None
    torch.version.cuda = "13.0"
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, is_active=lambda: True
        )
    )
