"""The README's table of benchmark figures, from the JSON files in benchmarks/results/.

python benchmarks/report.py            # prints the table
python benchmarks/report.py --write    # puts it between the marks in README.md
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks -->\n", "<!-- /benchmarks -->"

OPS = {
    "masked_steer": "steer every second token",
    "ablate": "project out a direction",
    "three": "steer, project, clamp at once",
}
LOADER = {
    "copy": "copying the same bytes in order",
    "stored": "StoreDataset, shuffled, checked, float16 as stored",
    "float32": "StoreDataset, shuffled, checked, float32",
    "datasets": "HF datasets (arrow), shuffled",
    "saelens": "SAELens, shuffled within its buffer",
}
ENGINE = {
    "noop": "a no-op edit on every attention",
    "record": "recording every attention at every step",
    "steer": "steering every attention",
    "sweep_batch": "a sweep of strengths in one batch, beside a plain batch",
}

AIMS = {  # times the speed that each row was to reach
    "batch_topk bfloat16": 80,
    "batch_topk float32": 45,
    "topk": 5,
    "encode": 4,
    "decode_bag": 1,
    "decode_dense": 15,
}


def table() -> str:
    """The tables of all results, with the machine and commit of each."""
    parts = [ops(each) for each in found("ops-*.json")]
    parts += [engine(each) for each in found("engine-*.json")]
    parts += [attention(each) for each in found("attention-*.json")]
    parts += [directions(each) for each in found("directions-*.json")]
    parts += [guidance(each) for each in found("guide-*.json")]
    parts += [harvest(each) for each in found("harvest-*.json")]
    parts += [writer(each) for each in found("writer-*.json")]
    parts += [loader(each) for each in found("loader-*.json")]
    parts += [scale(each) for each in found("store-scale-*.json")]
    parts += [reft(each) for each in found("reft-*.json")]
    parts += [selections(each) for each in found("sae-ops*.json")]
    parts += [products(each) for each in found("sae-products*.json")]
    parts += [training(each) for each in found("sae-training*.json")]
    parts += [peers(each) for each in found("peers-*.json")]
    parts += [gpu_ops(each) for each in found("gpu-ops*.json")]
    parts += [gpu_edits(each) for each in found("gpu-edits*.json")]
    parts += [gpu_sae(each) for each in found("gpu-sae*.json")]
    parts += [engine(each) for each in found("gpu-engine*.json")]
    parts += [harvest(each) for each in found("gpu-harvest*.json")]
    return "\n".join(parts) if parts else "No results yet.\n"


def found(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def ops(result: dict[str, Any]) -> str:
    """Fused kernels beside plain torch and beside touching the same memory once."""
    lines = []
    for row in result["rows"]:
        plain = [name for name in row["speedup"] if name != "separate"]
        best = min(plain, key=lambda name: row["speedup"][name]["median"])
        alone = (
            f"; one by one {times(row['speedup']['separate'])}"
            if len(row["speedup"]) > len(plain)
            else ""
        )
        inside = row.get("in_place_to_rewrite")
        lines.append(
            (
                f"{OPS.get(row['kind'], row['kind'])}, {row['dtype']}",
                f"{row['milliseconds']['fused']:.2f} ms",
                f"{times(row['speedup'][best])} ({best}){alone}",
                times(row["fused_to_rewrite"]),
                times(inside) if inside else "",
            )
        )
    shape = "×".join(str(size) for size in result["rows"][0]["shape"][-2:])
    head = (
        f"Operator, {shape}",
        "time",
        "times as fast as the best of plain torch in place",
        "against rewriting the memory",
        "the same in place",
    )
    return titled("Operators", result, head, lines)


def engine(result: dict[str, Any]) -> str:
    """What edits and recordings add to generation."""
    plain = result["seconds"]["plain"]["median"]
    lines = [
        (text, f"{percent(result['ratio'][name])}", goal(result, name))
        for name, text in ENGINE.items()
    ]
    title = f"{result['pictures']} pictures, {result['steps']} steps of {result['model']}"
    if result["weights"] == "random":
        title += " with random weights"
    head = (f"{title} ({plain:.1f} s)", "added time", "goal")
    swept = times(result["ratio"]["sweep"])
    tail = (
        f"A sweep of {result['pictures']} strengths as one batch is {swept} as fast as one by one."
    )
    return titled("Engine", result, head, lines) + f"\n{tail}\n"


def attention(result: dict[str, Any]) -> str:
    """Word maps from queries and keys, beside probabilities that are formed."""
    lines = []
    for row in result["rows"]:
        layout = {"tokens": "as models hold them", "dense": "contiguous"}[row["layout"]]
        count = row["sizes"]["words"]
        words = f"{count} word" + "s" * (count > 1)
        peak = row["peak_bytes"]
        lines.append(
            (
                f"{words}, q and k {layout}, {row['dtype']}",
                f"{row['milliseconds']['fused']:.2f} ms",
                f"{times(row['speedup']['eager'])} faster",
                f"{peak['fused'] / 2**20:.2f} MiB, not {peak['eager'] / 2**20:.0f}",
            )
        )
    sizes = result["rows"][0]["sizes"]
    what = f"Word maps, {sizes['heads']} heads × {sizes['queries']} queries × {sizes['keys']} keys"
    head = (
        what,
        "time",
        f"against plain torch (goal {result['goal']:g}×)",
        "memory beside the result",
    )
    return titled("Attention", result, head, lines)


def directions(result: dict[str, Any]) -> str:
    """Fitting a direction beside reading the rows."""
    speed = times(result["speed_of_plain_read"])
    text = (
        f"A direction (means and variances in float64) from {result['rows'] / 1e6:g} M × "
        f"{result['features']} rows of {result['dtype']} takes "
        f"{result['seconds']['fit']['median']:.2f} s: {speed} the speed of a plain read "
        f"(goal {result['goal']:g}×)."
    )
    return noted("Directions", result, text)


def guidance(result: dict[str, Any]) -> str:
    """Guidance by a probe beside autograd of the same, and its gradient written by hand."""
    lines = [
        (
            f"{row['steps']} inner step" + "s" * (row["steps"] > 1) + f", {row['dtype']}",
            f"{row['milliseconds']['kernel']:.1f} ms ({row['gigaflops']:.0f} GFLOP/s)",
            f"{times(row['speedup']['autograd'])} faster",
            f"{times(row['speedup']['by_hand'])} faster",
        )
        for row in result["rows"]
    ]
    sizes = result["sizes"]
    what = f"Probe of two layers of {sizes['hidden']}, {sizes['rows']}×{sizes['width']}"
    head = (what, "time", f"against autograd (goal {result['goal']:g}×)", "against plain torch")
    return titled("Probe guidance", result, head, lines)


def harvest(result: dict[str, Any]) -> str:
    """What storing activations adds to generation."""
    seconds = {name: each["median"] for name, each in result["seconds"].items()}
    text = (
        f"{result['pictures']} pictures, {result['steps']} steps of {result['model']} "
        f"({seconds['plain']:.1f} s): storing a quarter of the tokens of all {result['sites']} "
        f"attentions at all steps in bfloat16 ({result['bytes'] / 1e6:.0f} MB) adds "
        f"{percent(result['ratio']['units'])} (goal ≤ {100 * (result['goal'] - 1):.0f} %). A job "
        f"takes {seconds['run'] - seconds['units']:.1f} s once for the size of its units, the "
        "fingerprint, manifest and index."
    )
    return noted("Harvest", result, text)


def writer(result: dict[str, Any]) -> str:
    """Writing shards beside plain writes of the same bytes."""
    goals, cores = result["goals"], result["core_seconds_per_gigabyte"]["writer"]["median"]
    rate = result["gigabytes"] / result["seconds"]["writer"]["median"]
    text = (
        f"{rate:.2f} GB/s of {result['stored']} to disk: {times(result['of_raw'])} the speed of "
        f"plain O_DIRECT writes of the same bytes (goal {goals['of_raw']:g}×), "
        f"{times(result['of_save'])} that of `safetensors.save_file` "
        f"(goal {goals['of_save']:g}×; {times(result['of_synced'])} where that syncs), for "
        f"{cores - result['packing']:.2f} core seconds per GB beside the conversion "
        f"(goal {goals['core_seconds_per_gigabyte']:g})."
    )
    return noted("Writing a store", result, text)


def loader(result: dict[str, Any]) -> str:
    """Shuffled rows per second beside other readers of the same rows."""
    rates, lines = result["rows_per_second"], []
    for name, each in rates.items():
        ratio, wanted = result["ratio"].get(name), result["goal"].get(name)
        lines.append(
            (
                LOADER[name],
                f"{each['median']:,.0f}",
                f"{times(ratio)} (goal {wanted:g}×)" if ratio else "",
            )
        )
    what = f"Batches of {result['batch']} rows of {result['row_bytes']} bytes, page cache warm"
    return titled("Loading a store", result, (what, "rows/s", "our speed in theirs"), lines)


def scale(result: dict[str, Any]) -> str:
    """A store of a billion rows that is simulated, and what a row of real ones costs."""
    large, goals = result["simulated"], result["goals"]
    seconds, real = large["median_seconds"], result["measured"]["nanoseconds_per_row"]
    cost = {
        name: ", ".join(f"{each[name]:.0f}" for each in real.values())
        for name in ("write", "verify")
    }
    shuffle = ", ".join(f"{each:.0f}" for each in result["shuffle_nanoseconds_per_row"].values())
    row, sizes = result["measured"]["row_bytes"], result["shuffle_nanoseconds_per_row"]
    text = (
        f"An index of {large['rows']:.0e} rows in {large['shards']:,} shards (simulated) opens in "
        f"{seconds['open']:.2f} s (goal {goals['open']:g} s) with "
        f"{large['added_megabytes']:.0f} MB (goal {goals['megabytes']:g} MB); its first shuffled "
        f"batch is planned in {seconds['first_shuffled_batch']:.2f} s (goal "
        f"{goals['first_shuffled_batch']:g} s). Nanoseconds for a row of {row} bytes: to write "
        f"{cost['write']} and to verify {cost['verify']} in stores of {powers(real)} rows, to "
        f"shuffle {shuffle} of {powers(sizes)}."
    )
    return noted("Size of a store", result, text)


def powers(sizes: dict[str, Any]) -> str:
    return ", ".join(f"10^{len(size) - 1}" for size in sizes)


def reft(result: dict[str, Any]) -> str:
    """LoReFT beside pyreft and the fastest of plain torch, and training to the same error."""
    lines = []
    for row in result["rows"]:
        what = f"{row['tokens']}×{row['width']}, rank {row['rank']}, {row['dtype']}"
        for name, suffix in (("forward + backward", ""), ("forward", " forward")):
            time = row["milliseconds"][f"dreamreader{suffix}"]["median"]
            ratios = [aimed(row, f"{peer}{suffix}") for peer in ("pyreft", "torch")]
            lines.append((f"{what}: {name}", f"{time:.2f} ms", *ratios))
    for row in result["training"]:
        data = {"made": "made activations"}.get(row["data"], f"activations of {row['data']}")
        what = f"training on {data}, width {row['width']}, rank {row['rank']}"
        time = row["seconds"]["dreamreader"]["median"]
        lines.append((what, f"{time:.2f} s", aimed(row, "pyreft"), ""))
    peer = f"against pyreft {result['peers']['pyreft']}"
    head = ("LoReFT, with its orthonormality", "time", peer, "against plain torch")
    tail = "Training ends at the held-out error that pyreft reaches; both have the same settings."
    return titled("LoReFT", result, head, lines) + f"\n{tail}\n"


def aimed(row: dict[str, Any], name: str) -> str:
    """How many times as fast, and the goal where there is one."""
    wanted = row["goal"].get(name)
    return times(row["speedup"][name]) + (f" (goal {wanted:g}×)" if wanted else "")


def selections(result: dict[str, Any]) -> str:
    """Exact selections beside torch's topk, and encoders with one beside the bare product."""
    lines = []
    for row in result["rows"]:
        kind, dtype = row["case"].split()
        milliseconds = row["milliseconds"]
        if kind == "selections":
            for name, torch in (("batch_topk", "torch"), ("topk", "torch_rows")):
                aim = AIMS.get(f"{name} {dtype}", AIMS.get(name))
                ratio = f"{times(row[f'{name}_faster_than_{torch}'])} (goal {aim}×)"
                read = f"{row['to_read'][name]['median']:.2f}× reading it"
                lines.append((f"{name}, {dtype}", f"{milliseconds[name]:.1f} ms", ratio, read))
        elif kind == "encoders":
            for name in ("encode_batch_topk", "encode_topk", "encode_threshold"):
                ratio = f"{times(row[f'{name}_faster'])} (goal {AIMS['encode']}×)"
                bare = f"{milliseconds[name] / milliseconds['linear']:.2f}× the bare product"
                lines.append((f"{name}, {dtype}", f"{milliseconds[name]:.1f} ms", ratio, bare))
    head = ("4096×16384, 64 a row; encoders 1024×1280 → 16384", "time", "against torch", "and")
    tail = (
        "torch: `topk` of all entries (or of rows) and a scatter, with the product for encoders. "
        "Equal values, zeros, one giant row, ties and NaN take at most 6 % longer than that."
    )
    return titled("Selections of sparse autoencoders", result, head, lines) + f"\n{tail}\n"


def products(result: dict[str, Any]) -> str:
    """Sparse products beside embedding_bag and dense ones."""
    lines = []
    names = {
        "decode_bag": ("decode", "embedding_bag"),
        "decode_dense": ("decode", "a dense product"),
        "backward_dense": ("backward", "three dense products"),
    }
    for row in result["rows"]:
        for name, (what, other) in names.items():
            aim = f" (goal {AIMS[name]}×)" if name in AIMS else ""
            time = f"{row['milliseconds'][what]:.1f} ms"
            ratio = f"{times(row['speedup'][name])}{aim}"
            lines.append((f"{what}, {row['dtype']}", time, f"{ratio} of {other}"))
    head = ("1024 rows, 64 of 16384, width 1280", "time", "times as fast as")
    return titled("Products of sparse codes", result, head, lines)


def training(result: dict[str, Any]) -> str:
    """Training steps beside those of other libraries."""
    lines = []
    for row in result["rows"]:
        name = f"{row['peer']} {result['peers'][row['peer']]}"
        own, peer = (row["milliseconds"][each]["median"] for each in ("dreamreader", "peer"))
        lines.append(
            (
                f"{name}, {row['d_in']} → {row['d_sae']}, {row['dtype']}",
                f"{peer:.0f} ms",
                f"{own:.0f} ms",
                f"{times(row['speedup'])} (goal {row['goal']:g}×)",
            )
        )
    head = ("Training step of 4096 rows, 64 active", "theirs", "ours", "times as fast")
    tail = "From the same weights, with the same loss, optimiser and constraints; losses agree."
    return titled("Training of sparse autoencoders", result, head, lines) + f"\n{tail}\n"


def peers(result: dict[str, Any]) -> str:
    """One job through several libraries."""
    lines = []
    for name, each in result["peers"].items():
        version = each["versions"].get(name)
        lines.append(
            (
                f"{name} {version}" if version else name,
                percent(each["ratio"]["record"]),
                percent(each["ratio"]["steer"]),
            )
        )
    job = result["job"]
    what = f"{len(job['prompts'])} pictures, {job['steps']} steps, {len(job['sites'])} sites"
    head = (f"Added to the plain pipeline, {what}", "recording", "steering")
    return titled("Peers", result, head, lines)


def gpu_ops(result: dict[str, Any]) -> str:
    """The intervention program in place, beside a device copy of the same bytes."""
    lines = []
    for row in result["rows"]:
        wanted = f" (goal {row['goal']:g}×)" if row.get("goal") else ""
        lines.append(
            (
                f"{OPS.get(row['kind'], row['kind'])}, {row['dtype']}",
                f"{row['microseconds']['fused']:.1f} µs",
                times(row["fused_to_copy"]) + wanted,
            )
        )
    shape = "×".join(str(size) for size in result["rows"][0]["shape"][-2:])
    head = (f"Operator in place, {shape}, {result['backend']}", "time", "against a device copy")
    return titled("Operators on a GPU", result, head, lines)


def gpu_edits(result: dict[str, Any]) -> str:
    """Learned edits and guidance, beside a device copy and beside plain torch."""
    lines = []
    for row in result["rows"]:
        spent = row["microseconds"]
        pairs = [("edit", "edit in torch"), ("with gradient", "with gradient in torch")]
        for ours, plain in pairs if "edit" in spent else [("guide", "autograd")]:
            lines.append(
                (
                    f"{row['case']}, {row['dtype'].removeprefix('torch.')}: {ours}",
                    f"{spent[ours]:.1f} µs",
                    times(row["to_copy"][ours]),
                    f"{spent[plain] / spent[ours]:.2f}×",
                )
            )
    head = ("Learned edit", "time", "against a device copy", "against plain torch")
    return titled("Learned edits on a GPU", result, head, lines)


def gpu_sae(result: dict[str, Any]) -> str:
    """Selections, encoding and sparse products, each beside its baseline, and training steps."""
    lines, goals = [], result["goals"]
    for row in result["rows"]:
        of = f"{row['case']}, {row['dtype'].removeprefix('torch.')}"
        if "samples" in row:
            wanted = f"(goal at 768x4096 {goals['samples']:,})"
            lines.append((of, f"{row['samples']:,} samples/s", wanted))
            continue
        for name, ratio in row["to_base"].items():
            wanted = f" (goal {goals[name]:g}×)" if name in goals else ""
            spent, beside = row["microseconds"], f"{times(ratio)} {row['base']}"
            if name == "decode":
                beside = f"{spent['decode by bags'] / spent[name]:.2f}× as fast as bags"
            elif name == "backward":
                beside = f"{spent['backward by gathers'] / spent[name]:.2f}× as fast as gathers"
            lines.append((f"{of}: {name}", f"{spent[name]:.1f} µs", beside + wanted))
        if "peak_megabytes" in row:
            lines.append((f"{of}: peak", f"{row['peak_megabytes']} MB", ""))
    head = ("Sparse autoencoders", "time", "against")
    return titled("Sparse autoencoders on a GPU", result, head, lines)


def titled(name: str, result: dict[str, Any], head: tuple[str, ...], lines: list) -> str:
    """A table under the name of the benchmark and the machine it ran on."""
    where = result["environment"]
    rows = [head, ("---",) * len(head), *lines]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    commit = where["commit"].rstrip("+")
    note = f"{where['device']}, {where['threads']} threads, torch {where['versions']['torch']}"
    if "gpu" in where:
        copy, gemm = where["copy_gigabytes_per_second"], where["gemm_teraflops"]
        note = f"{where['gpu']}: copies {copy} GB/s, bfloat16 products {gemm} TFLOP/s; {note}"
    return f"**{name}** ({note}, commit {commit})\n\n{text}\n"


def noted(name: str, result: dict[str, Any], text: str) -> str:
    """A sentence under the name of the benchmark and the machine it ran on."""
    where = result["environment"]
    note = f"{where['device']}, {where['threads']} threads, commit {where['commit'].rstrip('+')}"
    return f"**{name}** ({note})\n\n{text}\n"


def times(ratio: dict[str, float]) -> str:
    """A ratio with its 20 and 80 % quantiles."""
    return f"{ratio['median']:.2f}× [{ratio['q20']:.2f}, {ratio['q80']:.2f}]"


def percent(ratio: dict[str, float]) -> str:
    """What a ratio adds, with its 20 and 80 % quantiles."""
    added = [100 * (ratio[key] - 1) for key in ("median", "q20", "q80")]
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*added)


def goal(result: dict[str, Any], name: str) -> str:
    return f"≤ {100 * (result['goals'][name] - 1):.0f} %" if name in result["goals"] else ""


def written(readme: str) -> str:
    """The README with the current table between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    if "--write" in sys.argv[1:]:
        path = ROOT / "README.md"
        path.write_text(written(path.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
