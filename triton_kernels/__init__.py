"""Triton kernels, one file per operator; installed as `dreamreader.triton_kernels`."""

if __name__ == "triton_kernels":
    raise ImportError(
        "this `triton_kernels` is a source folder of dreamreader, found because the repository "
        "root is on sys.path, where it hides the package of that name; import "
        "dreamreader.triton_kernels, or start Python elsewhere"
    )
