"""Where host and device spend their time on one site of an FFN, kernel by kernel: its shares, its
covariance by either product, and what is read out of 24 such sites at once."""

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from nerve.spectra import SampleShares, StreamingCovariance
from nerve.spectra.shares import shares_of

N_SITES = 24


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

    several = [SampleShares(args.d_ff, device="cuda") for _ in range(N_SITES)]
    spreads = [each.update(x) for each in several]

    def covariance() -> None:
        StreamingCovariance(args.d_ff, device="cuda").update(x, None, spreads[0])

    def centered_covariance() -> None:
        StreamingCovariance(args.d_ff, device="cuda", product="float16x2").update(x)

    def read_out() -> None:
        shares_of(several)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape}")
    for what in (shares, covariance, centered_covariance, read_out):
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
