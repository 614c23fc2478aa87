"""The packages, and the compiled extension iirsnn._C where torch and a compiler are at hand."""

import importlib.util
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def load_build():
    """iirsnn/ops/build.py by its path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "iirsnn" / "ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pure(reason):
    if os.environ.get("IIRSNN_BUILD_CUDA") == "1":
        raise RuntimeError(
            f"IIRSNN_BUILD_CUDA=1: expected a CUDA build to be possible, but {reason}"
        )
    print(
        f"warning: iirsnn: {reason}; installing pure Python, which compiles itself at first use",
        file=sys.stderr,
    )
    return {}


def extension():
    try:
        import torch  # noqa: F401
        from torch.utils import cpp_extension
    except ImportError:
        return pure("torch is not installed (with --no-build-isolation it would be seen)")
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return pure(f"there is no C++ compiler ({compiler})")
    build = load_build()
    # a wheel may go to another machine; what is compiled in place stays on this one
    plan = build.recipe(build.cuda_mode(), "all" if "bdist_wheel" in sys.argv else "usable")
    print(f"iirsnn: CUDA {'on' if plan['cuda'] else 'off'} ({plan['why']})", file=sys.stderr)
    kind = cpp_extension.CUDAExtension if plan["cuda"] else cpp_extension.CppExtension
    module = kind(
        "iirsnn._C",
        [os.path.relpath(path, ROOT) for path in plan["sources"]],
        extra_compile_args={"cxx": plan["cxx"], "nvcc": plan["nvcc"]},
        include_dirs=[str(ROOT / "csrc")],
    )

    class Build(cpp_extension.BuildExtension):
        """Keeps what it compiles: for pip's editable installation each one would start anew.

        What does not compile is left out, and compiles itself at first use.
        """

        def finalize_options(self):
            kept = ROOT / "build" / f"objects-{sys.implementation.cache_tag}"
            self.build_temp = self.build_temp or str(kept)
            super().finalize_options()
            self.force = True  # link: other kernels than before may be asked for

        def run(self):
            try:
                with ThreadPoolExecutor(1) as pool:
                    folder = Path(self.build_temp, "kernels")
                    sources, command = build.kernel_sources(), plan["kernels"]
                    self.kernels = pool.submit(build.compile_objects, sources, folder, command)
                    super().run()
                    package = Path(self.get_ext_fullpath(module.name)).parent
                    build.link_engine(self.kernels.result(), package / "runtime" / build.ENGINE)
            except Exception as error:  # whatever a compiler, ninja or torch's check of them does
                if "build_ext" in sys.argv:  # who asks for the kernels alone gets no less
                    raise
                first, *_ = str(error).strip().splitlines() or [type(error).__name__]
                pure(f"the C++ kernels do not compile ({first})")
                self.extensions = []

        def build_extensions(self):  # what needs torch, while the kernels are compiled
            link = self.compiler.link_shared_object

            def link_both(objects, *rest, **options):
                kernels = self.kernels.result()
                more = [str(kernels[source]) for source in build.extension_sources()]
                return link([*objects, *more], *rest, **options)

            self.compiler.link_shared_object = link_both
            super().build_extensions()

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


# what pyproject.toml places beside the package cannot be found in it
BESIDE = ["iirsnn.csrc", "iirsnn.kernels", "iirsnn.recipes"]
setup(packages=[*find_packages(include=["iirsnn", "iirsnn.*"]), *BESIDE], **extension())
