"""Where the device's time goes while the features of one FFN are taken, kernel by kernel."""

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from nerve.spectra import SampleShares, StreamingCovariance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--d-ff", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", type=int, default=25, help="kernels to show")
    args = parser.parse_args()
    shape = (args.sequences, args.seq_len, args.d_ff)
    x = torch.randn(shape, device="cuda").bfloat16()

    def shares() -> object:
        return SampleShares(args.d_ff, device="cuda").update(x)

    spread = SampleShares(args.d_ff, device="cuda").update(x)

    def covariance() -> None:
        StreamingCovariance(args.d_ff, device="cuda").update(x, None, spread)

    def read_out() -> None:
        given.shares()

    given = SampleShares(args.d_ff, device="cuda")
    given.update(x)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape}")
    for what in (shares, covariance, read_out):
        for _ in range(3):
            what()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(args.repeats):
            what()
        queued = time.perf_counter() - began
        torch.cuda.synchronize()
        done = time.perf_counter() - began
        print(
            f"{what.__name__}: {1e3 * done / args.repeats:.2f} ms, of which the host takes "
            f"{1e3 * queued / args.repeats:.2f}"
        )
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            for _ in range(args.repeats):
                what()
            torch.cuda.synchronize()
        print(
            found.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=args.rows, max_name_column_width=60
            )
        )


if __name__ == "__main__":
    main()
