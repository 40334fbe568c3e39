"""How fast the fish speaks, beside others who run the same weights. Whoever is compared takes turns within one run.

    python -m benchmarks.inference              1, 8, 32 and 64 at once: tokens a second, latency, memory
    python -m benchmarks.inference grow         our engine alone: by length and by how many at once
    python -m benchmarks.inference forever      100,000 replies: does memory grow?

Everybody gets the same weights, the same prompts and as many new tokens to make for each (thoughts included; nobody
stops early), with the same sampling. Each is a process of its own; those with settings for threads are listed once for
each that may be the best. `--device cuda` compares on a GPU. Peers: pip install transformers ctranslate2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 40}  # --greedy: a top_k of 1
TOKENS = 24
THREADS = os.cpu_count() or 1

# A runner makes so many tokens for each prompt and says for each when its third came (the first word, after the two
# thoughts) and when the last, in seconds from the start.
Times = list[tuple[float, float]]
Runner = Callable[[list[str], int], Times]


def prompts(count: int) -> list[str]:
    """What people say, from the evaluation page's prompts."""
    from guppylm.checkpoint import WEIGHTS

    file = WEIGHTS.parent / "characters/guppy/evaluation.jsonl"
    rows = [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [rows[index * 7 % len(rows)] for index in range(count)]


# -- who takes part ---------------------------------------------------------------------------------------


def ours(precision: str) -> Callable[[argparse.Namespace], Runner]:
    """Our engine."""

    def make(options: argparse.Namespace) -> Runner:
        from guppylm.conversation import IM_END
        from guppylm.engine import NEVER, Engine, Sampling

        most = max(options.at_once)
        fish = Engine.load(options.model, device=options.device, precision=precision, max_batch=most)  # type: ignore[arg-type]
        fish._masks[:, IM_END] = NEVER  # nobody stops early
        thoughts = 2 if fish.chat.thoughts else 0
        loop = asyncio.new_event_loop()

        async def one(prompt: str, tokens: int) -> tuple[float, float]:
            begun, first = time.perf_counter(), 0.0
            sampling = Sampling(**SAMPLING, max_new_tokens=tokens - thoughts)
            async for _ in fish.stream(prompt, sampling):
                first = first or time.perf_counter() - begun
            return first, time.perf_counter() - begun

        async def whole(prompt: str, tokens: int) -> float:
            begun = time.perf_counter()
            await fish.ask(prompt, Sampling(**SAMPLING, max_new_tokens=tokens - thoughts))
            return time.perf_counter() - begun

        async def all_of(given: list[str], tokens: int) -> Times:
            # As the bots ask: whole replies. When the first word comes is seen in a round of streams.
            streamed = await asyncio.gather(*(one(prompt, thoughts + 2) for prompt in given))
            asked = await asyncio.gather(*(whole(prompt, tokens) for prompt in given))
            return [(first, last) for (first, _), last in zip(streamed, asked, strict=True)]

        return lambda given, tokens: loop.run_until_complete(all_of(given, tokens))

    return make


def textbook(options: argparse.Namespace) -> Runner:
    """The loop of the public model: every token's whole past once more, one prompt at a time."""
    import torch

    from guppylm import checkpoint

    torch.set_num_threads(1)  # its products are so small that two threads only wait for each other
    loaded = checkpoint.load(options.model)
    model = loaded.model.to(options.device)

    @torch.inference_mode()
    def run(given: list[str], tokens: int) -> Times:
        begun, times = time.perf_counter(), []
        for prompt in given:
            ids = torch.tensor([loaded.format.encode_prompt(prompt).ids], device=options.device)
            for count in range(1, tokens + 1):
                logits = model(ids)[0, -1] / SAMPLING["temperature"]
                values, likeliest = logits.topk(SAMPLING["top_k"])
                chosen = likeliest[torch.multinomial(values.softmax(-1), 1)]
                ids = torch.cat([ids, chosen[None]], dim=1)
                if count == 3:
                    first = time.perf_counter() - begun
            ids.tolist()
            times.append((first, time.perf_counter() - begun))
        return times

    return run


def opt_folder(model: str) -> tuple[Path, list[Any]]:
    """The weights as OPT, whose layout is ours, in a temporary folder. Checks that the logits agree."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    from guppylm import checkpoint

    loaded = checkpoint.load(model)
    ours, config = loaded.model, loaded.model.config
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            word_embed_proj_dim=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            ffn_dim=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            activation_function="relu",
            do_layer_norm_before=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    decoder = "model.decoder."
    state = {
        f"{decoder}embed_tokens.weight": ours.tok_emb.weight,
        "lm_head.weight": ours.tok_emb.weight,
        # OPT's first position is number 2.
        f"{decoder}embed_positions.weight": torch.cat([torch.zeros(2, config.hidden_size), ours.pos_emb.weight]),
        f"{decoder}final_layer_norm.weight": ours.norm.weight,
        f"{decoder}final_layer_norm.bias": ours.norm.bias,
    }
    for number, block in enumerate(ours.blocks):
        layer = f"{decoder}layers.{number}."
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", getattr(block.attn.qkv, kind).chunk(3), strict=True):
                state[f"{layer}self_attn.{name}_proj.{kind}"] = part
            for name, module in {
                "self_attn.out_proj": block.attn.out,
                "self_attn_layer_norm": block.norm1,
                "final_layer_norm": block.norm2,
                "fc1": block.ffn.up,
                "fc2": block.ffn.down,
            }.items():
                state[f"{layer}{name}.{kind}"] = getattr(module, kind)
    opt.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    ids = torch.tensor([loaded.format.encode_prompt("are you hungry").ids])
    with torch.no_grad():
        apart = float((opt(ids).logits - ours(ids)).abs().max())
    if apart > 1e-3:
        sys.exit(f"The converted weights do not say the same: logits lie {apart:.4f} apart.")
    folder = Path(tempfile.mkdtemp(prefix="guppy-opt-"))
    opt.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=loaded.format.tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>",
        unk_token="<pad>",
    ).save_pretrained(folder)  # fmt: skip
    return folder, [loaded.format]


def whole_batch(generate: Callable[[int], object], begun: float, tokens: int, people: int) -> Times:
    """The times of who answers a whole batch at once, for each of `people`. Such a one says nothing before the end, so
    the first word is timed on its own: three tokens, without the encoding that `begun` begins with."""
    generate(tokens)
    last = time.perf_counter() - begun
    begun = time.perf_counter()
    generate(3)
    return [(time.perf_counter() - begun, last)] * people


def transformers(threads: int) -> Callable[[argparse.Namespace], Runner]:
    """Hugging Face transformers' generate, all prompts in one batch."""

    def make(options: argparse.Namespace) -> Runner:
        import torch
        from transformers import OPTForCausalLM

        torch.set_num_threads(threads)
        folder, (chat,) = opt_folder(options.model)
        model = OPTForCausalLM.from_pretrained(folder).eval().to(options.device)

        @torch.inference_mode()
        def run(given: list[str], tokens: int) -> Times:
            begun = time.perf_counter()
            ids = [chat.encode_prompt(prompt).ids for prompt in given]
            longest = max(map(len, ids))
            batch = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=options.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=options.device)

            def generate(count: int) -> None:
                model.generate(
                    batch, attention_mask=mask, do_sample=True, **SAMPLING, min_new_tokens=count, max_new_tokens=count
                ).tolist()

            return whole_batch(generate, begun, tokens, len(given))

        return run

    return make


def ctranslate2(precision: str, replicas: int, threads: int) -> Callable[[argparse.Namespace], Runner]:
    """CTranslate2, with so many replicas of so many threads; the prompts dealt out evenly."""

    def make(options: argparse.Namespace) -> Runner:
        import ctranslate2 as ct2

        folder, (chat,) = opt_folder(options.model)
        ct2.converters.TransformersConverter(str(folder)).convert(str(folder / "ct2"))
        generator = ct2.Generator(
            str(folder / "ct2"),
            device=options.device,
            compute_type=precision,
            inter_threads=replicas,
            intra_threads=threads,
        )

        def run(given: list[str], tokens: int) -> Times:
            begun = time.perf_counter()
            batch = [[chat.tokenizer.id_to_token(i) for i in chat.encode_prompt(prompt).ids] for prompt in given]

            def generate(count: int) -> None:
                generator.generate_batch(
                    batch,
                    max_batch_size=-(-len(batch) // replicas),
                    sampling_topk=SAMPLING["top_k"],
                    sampling_temperature=SAMPLING["temperature"],
                    min_length=count,
                    max_length=count,
                    include_prompt_in_result=False,
                )

            return whole_batch(generate, begun, tokens, len(given))

        return run

    return make


def runners(device: str) -> dict[str, Callable[[argparse.Namespace], Runner]]:
    if device == "cuda":
        return {
            "textbook loop": textbook,
            "transformers": transformers(1),
            "ours, fp32": ours("fp32"),
            "ours, bf16": ours("bf16"),
        }
    return {
        "textbook loop": textbook,
        "transformers, 1 thread": transformers(1),
        f"transformers, {THREADS} threads": transformers(THREADS),
        f"CTranslate2 float32, {THREADS} x 1": ctranslate2("float32", THREADS, 1),
        f"CTranslate2 float32, 1 x {THREADS}": ctranslate2("float32", 1, THREADS),
        "CTranslate2 int8, 1 x 1": ctranslate2("int8", 1, 1),
        f"CTranslate2 int8, {THREADS} x 1": ctranslate2("int8", THREADS, 1),
        f"CTranslate2 int8, 1 x {THREADS}": ctranslate2("int8", 1, THREADS),
        "ours, fp32": ours("fp32"),
        "ours, bf16": ours("bf16"),
        "ours, int8": ours("int8"),
    }


# -- each in a process of its own -------------------------------------------------------------------------


def _serve(make: Callable[[argparse.Namespace], Runner] | str, options: argparse.Namespace, pipe: Connection) -> None:
    assert isinstance(make, str)
    if options.greedy:
        SAMPLING["top_k"] = 1
    try:
        run = runners(options.device)[make](options)
        run(prompts(2), TOKENS)
    except ModuleNotFoundError as missing:
        pipe.send(f"{missing.name} is not installed here: pip install {missing.name}")
        return
    except ValueError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while (order := pipe.recv()) is not None:
        pipe.send((run(*order), memory("VmHWM")))


def memory(kind: str) -> float:
    """What this process has (VmRSS), or the most it had (VmHWM), in MB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024
    return float("nan")


class Contender:
    """A runner in a process of its own."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(name, options, theirs), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.absent: str | None = self.pipe.recv()
        except EOFError:
            self.absent = "it ended while it loaded"

    def run(self, given: list[str], tokens: int) -> tuple[Times, float]:
        self.pipe.send((given, tokens))
        answer: tuple[Times, float] = self.pipe.recv()
        return answer


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def compare(options: argparse.Namespace) -> None:
    contenders = []
    for name in runners(options.device):
        if options.only and not any(part in name for part in options.only):
            continue
        contender = Contender(name, options)
        if contender.absent:
            print(f"(without {name}: {contender.absent})")
        else:
            contenders.append(contender)
    speed: dict[str, dict[int, float]] = {contender.name: {} for contender in contenders}
    rows: dict[str, list[str]] = {contender.name: [] for contender in contenders}
    for n in options.at_once:
        given = prompts(n)
        times: dict[str, list[Times]] = {contender.name: [] for contender in contenders}
        megabytes: dict[str, float] = {}
        for _ in range(options.rounds):
            for contender in contenders:
                # The textbook loop takes prompts one by one: eight say as much as 64.
                some = given[:8] if contender.name == "textbook loop" else given
                result, megabytes[contender.name] = contender.run(some, options.tokens)
                times[contender.name].append(result)
        for name, rounds in times.items():
            # The median round, so that neither a lucky nor a disturbed one counts.
            took = statistics.median(max(last for _, last in round_) for round_ in rounds)
            made = len(rounds[0]) * options.tokens
            speed[name][n] = made / took
            firsts = [first for round_ in rounds for first, _ in round_]
            lasts = [last for round_ in rounds for _, last in round_]
            rows[name].append(
                f"| {n} | {name} | {len(rounds[0]) / took:,.1f} | {made / took:,.0f} | "
                f"{percentile(firsts, 50) * 1e3:.1f}, {percentile(firsts, 99) * 1e3:.1f} | "
                f"{percentile(lasts, 50) * 1e3:.1f}, {percentile(lasts, 99) * 1e3:.1f} | {megabytes[name]:.0f} |"
            )
            print(rows[name][-1], flush=True)
    print("\n| at once | who | replies/s | tokens/s | first word, p50, p99 (ms) | reply, p50, p99 (ms) | peak MB |")
    print("|---:|---|---:|---:|---|---|---:|")
    for index in range(len(options.at_once)):
        for name in rows:
            print(rows[name][index])
    print()
    for n in options.at_once:
        best = {ours: max((s[n] for name, s in speed.items() if name.startswith("ours") == ours), default=0.0)
                for ours in (True, False)}  # fmt: skip
        if all(best.values()):
            print(f"{n} at once: ours makes {best[True] / best[False]:.2f} times the tokens of the best peer")
    for contender in contenders:
        contender.pipe.send(None)
    if options.picture:
        options.picture.write_text(picture(speed), encoding="utf-8")


def grow(options: argparse.Namespace) -> None:
    """Our engine alone, at the best precision: new tokens by at-once."""
    options.at_once = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    lengths = [16, 32, 64, 96]
    engine = Contender(options.only[0] if options.only else "ours, int8", options)
    if engine.absent:
        sys.exit(engine.absent)
    print("| at once | " + " | ".join(f"{tokens} new tokens" for tokens in lengths) + " |")
    print("|---:|" + "---:|" * len(lengths))
    for n in options.at_once:
        cells = []
        for tokens in lengths:
            took = [max(last for _, last in engine.run(["hi"] * n, tokens)[0]) for _ in range(options.rounds)]
            cells.append(f"{n * tokens / statistics.median(took):,.0f}")
        print(f"| {n} | " + " | ".join(cells) + " |", flush=True)


def forever(options: argparse.Namespace) -> None:
    from guppylm.engine import Engine

    async def talk() -> None:
        fish = Engine.load(options.model, device=options.device, precision=options.precision, max_batch=32)
        given = prompts(1000)
        begun = time.perf_counter()
        for done in range(0, options.replies + 1, 32):
            await asyncio.gather(*(fish.ask(given[(done + i) % 1000]) for i in range(32)))
            if done % (32 * (options.replies // 320)) == 0:
                print(
                    f"{done + 32:>7,} replies: {memory('VmRSS'):.1f} MB ({time.perf_counter() - begun:.0f} s)",
                    flush=True,
                )
        await fish.aclose()

    asyncio.run(talk())


# -- the picture ------------------------------------------------------------------------------------------


def picture(speed: dict[str, dict[int, float]]) -> str:
    """Tokens a second, as bars: of each contender its best settings."""
    kinds = ["textbook loop", "transformers", "CTranslate2 float32", "CTranslate2 int8", "ours"]
    at_once = list(next(iter(speed.values())))
    best = {
        kind: {n: max((s[n] for name, s in speed.items() if name.startswith(kind)), default=0.0) for n in at_once}
        for kind in kinds
    }
    most = max(value for by_number in best.values() for value in by_number.values())
    colours = dict(zip(kinds, ("#8c959f", "#8c959f", "#6e9bc5", "#4682b4", "#f28c28"), strict=True))
    bar, gap, left, width = 15, 16, 150, 720
    lines, y = [], 34
    for n in at_once:
        lines.append(f'<text x="0" y="{y + 12}" class="t b">{n} at once</text>')
        y += 20
        for kind in kinds:
            value = best[kind][n]
            if not value:
                continue
            length = max(1.0, value / most * (width - left - 70))
            label = "Guppy's engine" if kind == "ours" else kind
            lines.append(
                f'<text x="{left - 8}" y="{y + 12}" class="t" text-anchor="end">{label}</text>'
                f'<rect x="{left}" y="{y + 1}" width="{length:.1f}" height="{bar - 2}" rx="2" fill="{colours[kind]}"/>'
                f'<text x="{left + length + 6:.1f}" y="{y + 12}" class="t">{value:,.0f}</text>'
            )
            y += bar + 3
        y += gap
    style = (
        ".t{font:12px system-ui,sans-serif;fill:#57606a}.b{font-weight:600}"
        "@media(prefers-color-scheme:dark){.t{fill:#adbac7}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" role="img" '
        f'aria-label="Tokens a second of Guppy\'s engine and of others"><style>{style}</style>\n'
        '<text x="0" y="14" class="t b">Tokens a second with the same weights on two processor cores</text>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["compare", "grow", "forever"], default="compare")
    parser.add_argument("--model", default="guppy-9m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", help="of `forever`")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--replies", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", default=[], help="whose names contain one of these")
    parser.add_argument("--picture", type=Path, help="write the bars here, as SVG")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token: no time for sampling")
    options = parser.parse_args()
    {"compare": compare, "grow": grow, "forever": forever}[options.what](options)


if __name__ == "__main__":
    main()
