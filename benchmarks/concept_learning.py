#!/usr/bin/env python3
"""Measures what the trainer teaches the embedded model, and what it spoils; prints the tables of docs/measurements.md.

    python benchmarks/concept_learning.py [--seeds 0 1 2] [--quick] [-- --max_train_steps 400]
    python benchmarks/concept_learning.py --cache_latents 1 2 4

Trains in processes of their own, as a user does, with the quickstart's flags (flags after `--` are added to them):
the cat with and without prior preservation, and cat and pot together, once per seed. The pictures are judged by
tools/measure.py, which knows colours and places and has no learned part. There are two disjoint sets of prompts and
backgrounds, neither among the instance pictures: settings were chosen on "tuning" (`--tuning`: the cat with prior
preservation alone), the tables come from "final". Before and after start from the same noise. --cache_latents
compares the cat with prior preservation as it is with that on so many fixed augmentations of each picture.
Everything lies in results/concept_learning; an interrupted run goes on where it stopped.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tools"), str(ROOT / "examples")]

# ruff: noqa: E402
import measure
import world
from before_after import WEIGHTS_NAME, generate, load_concept, load_pipeline

# The flags of examples/quickstart.sh; paths are relative to the repository.
MODEL = ["--pretrained_model_name_or_path", "assets/model"]
CAT = ["--instance_data_dir", "assets/instance/cat", "--instance_prompt", "photo of a <new1> cat"]
CAT += ["--modifier_token", "<new1>", "--initializer_token", "yellow"]
PRIOR = ["--with_prior_preservation", "--prior_loss_weight", "0.25", "--real_prior"]
CAT_CLASS = ["--class_data_dir", "assets/regularization/cat", "--class_prompt", "cat"]
SETTINGS = ["--resolution", "128", "--train_batch_size", "8", "--max_train_steps", "500", "--noaug", "--hflip"]
SETTINGS += ["--learning_rate", "2e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20"]
QUICKSTART = [*MODEL, *CAT, *PRIOR, *CAT_CLASS, *SETTINGS]
BOTH = ["--concepts_list", "concept_list.json", "--modifier_token", "<new1>+<new2>"]
BOTH += ["--initializer_token", "yellow+orange"]
RUNS = {
    "with prior": QUICKSTART,
    "without prior": [*MODEL, *CAT, *SETTINGS],
    "cat and pot": [*MODEL, *BOTH, *PRIOR, *SETTINGS, "--max_train_steps", "800"],
}

TOKENS = {"cat": "<new1>", "pot": "<new2>"}
BACKGROUNDS = {
    "tuning": {"cat": ["orange", "pink"], "pot": ["pink", "night"]},
    "final": {"cat": ["yellow", "green", "gray"], "pot": ["green", "gray", "beach", "grass"]},
}
OPENINGS = {
    "tuning": ["photo of a {thing}", "a picture of a {thing}"],
    "final": ["photo of a {thing}", "a photo of a {thing}", "a {thing}", "photo of a big {thing}"],
}
SEEDS = {"tuning": 100, "final": 200}  # of control prompts, wordings of the background, and noise
WORDS = {  # the concepts described to the untrained model; the best description counts
    "cat": [
        "yellow cat with a purple outline and a green dot",
        "yellow cat with a purple outline and green dots",
        "yellow cat with a purple outline",
        "purple and yellow cat with green dots",
        "purple, yellow and green cat",
    ],
    "pot": [
        "pink, blue and orange pot",
        "pink, blue and orange striped pot",
        "half pink half orange pot with blue stripes",
        "blue pot with pink and orange stripes",
        "half pink half orange pot",
    ],
}
ENVIRONMENT = {
    # glibc would return every large buffer to the system and ask for it again at the next step
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_NUM_THREADS": "1",  # one-thread runs side by side are faster than runs of more threads in turn
}
NUM_IMAGES, NUM_CONTROLS = 16, 100


def parse_args():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure what the trainer teaches the embedded model.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--quick", action="store_true", help="20 steps and one seed, to see that it works")
    parser.add_argument("--tuning", action="store_true", help="the tuning prompts, on the cat with prior alone")
    parser.add_argument("--cache_latents", type=int, nargs="+", metavar="K", help="compare cached latents, no more")
    parser.add_argument("flags", nargs="*", help="flags for the trainer, after --")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.flags = args.seeds[:1], [*args.flags, "--max_train_steps", "20"]
    return args


# ---------- Pictures and their measures -------------------------------------------------------------------------


def concept_prompts(prompts, kind, thing):
    """NUM_IMAGES prompts of a thing on the set's backgrounds of that kind, as (prompt, background name) pairs."""
    rng = random.Random(SEEDS[prompts])
    pairs = [(background, o) for o in OPENINGS[prompts] for background in BACKGROUNDS[prompts][kind]]
    pairs = [pairs[i % len(pairs)] for i in range(NUM_IMAGES)]
    return [(f"{o.format(thing=thing)} {world.where(background, rng)}", background) for background, o in pairs]


def draw(pipeline, prompts, seed):
    """One picture for each prompt."""
    images = []
    for start in range(0, len(prompts), 25):
        images += generate(pipeline, prompts[start : start + 25], seed + start)
    return images


def judge(images, backgrounds, kind, concept):
    """Mean measures: overlap with the concept's colours and layout, shares of right background, shape, red colour."""
    found = [measure.measure(image) for image in images]
    return {
        "colour": float(np.mean([measure.concept_color(image, concept) for image in images])),
        "layout": float(np.mean([measure.concept_layout(image, concept) for image in images])),
        "background": float(np.mean([f["background"] == name for f, name in zip(found, backgrounds, strict=True)])),
        "shape": float(np.mean([f["kind"] == kind for f in found])),
        "red": float(np.mean([measure.top_colors(f["histogram"], 1) == {"red"} for f in found])),
    }


def show(folder, name, images):
    """Writes pictures side by side, eight in a row."""
    sheet = Image.new("RGB", (8 * 132, -(-len(images) // 8) * 132), "gray")
    for i, image in enumerate(images):
        sheet.paste(image, (i % 8 * 132 + 2, i // 8 * 132 + 2))
    sheet.save(folder / f"{name}.png")


def judge_thing(pipeline, folder, prompts, kind, thing):
    """Draws a thing on the set's backgrounds of its kind and measures it against each concept."""
    pairs = concept_prompts(prompts, kind, thing)
    images = draw(pipeline, [prompt for prompt, _ in pairs], SEEDS[prompts])
    show(folder, thing.replace(",", ""), images)
    return {concept: judge(images, [name for _, name in pairs], kind, concept) for concept in TOKENS}


def judge_pipeline(pipeline, folder, prompts, kinds):
    """All measures of a base or trained pipeline: the concepts, plain things of their classes, control prompts."""
    results = {"concepts": {}, "leakage": {}}
    for kind in kinds:
        results["concepts"][kind] = judge_thing(pipeline, folder, prompts, kind, f"{TOKENS[kind]} {kind}")
        for thing in (kind, f"red {kind}"):
            results["leakage"][thing] = judge_thing(pipeline, folder, prompts, kind, thing)[kind]
    controls = world.eval_prompts(NUM_CONTROLS, SEEDS[prompts])
    images = draw(pipeline, [caption for caption, _ in controls], SEEDS[prompts] + NUM_IMAGES)
    show(folder, "controls", images)
    results["control"] = measure.score(controls, images)
    return results


def judge_limits(pipeline, folder, prompts):
    """Measures of the concepts in words, of true renders and of their round trip through the autoencoder."""
    import torch

    results = {}
    for kind in TOKENS:
        words = {thing: judge_thing(pipeline, folder, prompts, kind, thing)[kind] for thing in WORDS[kind]}
        rng, backgrounds = random.Random(SEEDS[prompts]), 8 * BACKGROUNDS[prompts][kind]
        renders = [world.render_concept(kind, background, rng)[0] for background in backgrounds]
        with torch.no_grad():
            pixels = pipeline.image_processor.preprocess(renders).to(pipeline.device)
            decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
        returned = pipeline.image_processor.postprocess(decoded)
        show(folder, f"ceiling {kind}", [*renders[:8], *returned[:8]])
        truth = {name: judge(images, backgrounds, kind, kind) for name, images in
                 (("true renders", renders), ("autoencoder", returned))}  # fmt: skip
        results[kind] = {"words": words, **truth}
    return results


# ---------- Runs ------------------------------------------------------------------------------------------------


def run(name, seed, flags, prompts):
    """Trains (unless `flags` is None) and measures; returns the measures. What is there already is kept."""
    model = (ROOT / "assets/model/unet/diffusion_pytorch_model.safetensors").read_bytes()
    key = repr((flags, BACKGROUNDS, OPENINGS, SEEDS, WORDS, NUM_IMAGES, NUM_CONTROLS)).encode() + model
    folder = ROOT / "results/concept_learning" / f"{prompts} {name} {seed} {hashlib.sha256(key).hexdigest()[:6]}"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "measures.json"
    if result.exists():
        return json.loads(result.read_text())
    if flags and not (folder / f"{WEIGHTS_NAME}.safetensors").exists():
        command = [
            sys.executable,
            "train_custom_diffusion.py",
            *flags,
            "--seed",
            str(seed),
            "--output_dir",
            str(folder),
        ]
        command += ["--report_to", "none"]
        with open(folder / "log.txt", "w") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    pipeline = load_pipeline(ROOT / "assets/model")
    kinds = list(TOKENS) if flags is None or "--concepts_list" in flags else ["cat"]
    if flags:
        load_concept(pipeline, folder, [TOKENS[kind] for kind in kinds])
    results = judge_pipeline(pipeline, folder, prompts, kinds)
    if flags is None:
        results["limits"] = judge_limits(pipeline, folder, prompts)
    result.write_text(json.dumps(results, indent=1))
    return results


# ---------- Tables ----------------------------------------------------------------------------------------------


def span(values):
    """Mean and, of several values, smallest and largest."""
    values = np.atleast_1d(values)
    return f"{values.mean():.2f}" + (f" ({values.min():.2f}-{values.max():.2f})" if len(values) > 1 else "")


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def concept_table(base, trained, kind):
    """How a concept's pictures score: before, in words, after each way of training, and the limits."""
    names, limits = ("colour", "layout", "background", "shape"), base["limits"][kind]

    def row(label, results):
        return [label, *(span([result[name] for result in results]) for name in names)]

    wording, words = max(limits["words"].items(), key=lambda item: item[1]["colour"] + item[1]["layout"])
    rows = [row("before", [base["concepts"][kind][kind]]), row(f'before, "{wording}"', [words])]
    after = {name: [result["concepts"][kind][kind] for result in results] for name, results in trained.items()}
    rows += [row(f"after, {name}", results) for name, results in after.items()]
    rows += [row(name, [limits[key]]) for name, key in LIMITS.items()]
    for name, results in after.items():
        shares = [[result[n] / limits["autoencoder"][n] for result in results] for n in names[:2]]
        rows.append([f"{name}: share of the autoencoder's", *map(span, shares), "", ""])
    return table([f'"{TOKENS[kind]} {kind}"', *names], rows)


LIMITS = {"true pictures through the autoencoder": "autoencoder", "true pictures": "true renders"}


def control_table(base, trained):
    """Accuracy on prompts without the new words, before and after."""
    rows = []
    for name, before in base["control"].items():
        after = [span([result["control"][name]["accuracy"] for result in results]) for results in trained.values()]
        rows.append([name, before["n"], span(before["accuracy"]), *after])
    return table(["control prompts", "n", "before", *trained], rows)


def leakage_table(base, trained, kind):
    """Overlap of the plain class with the concept, before and after."""
    rows = []
    for thing in (kind, f"red {kind}"):
        for name in ("colour", "layout") + (("red",) if thing != kind else ()):
            label = "the main colour is red" if name == "red" else f"overlap with the concept, {name}"
            after = [span([result["leakage"][thing][name] for result in results]) for results in trained.values()]
            rows.append([f'"{thing}": {label}', span(base["leakage"][thing][name]), *after])
    return table(["without the new word", "before", *trained], rows)


def both_table(results):
    """What each of two words brings when both were trained together."""
    rows = []
    for kind in TOKENS:
        scores = [result["concepts"][kind] for result in results]
        overlaps = [
            span([score[concept][name] for score in scores]) for concept in TOKENS for name in ("colour", "layout")
        ]
        rows.append([f'"{TOKENS[kind]} {kind}"', *overlaps, span([s[kind]["background"] for s in scores])])
    header = [f"{concept} concept, {name}" for concept in TOKENS for name in ("colour", "layout")]
    return table(["trained together", *header, "background"], rows)


def main():
    """Runs everything, two or more trainings side by side, and prints the tables."""
    args = parse_args()
    os.environ.update(ENVIRONMENT)
    prompts = "tuning" if args.tuning else "final"
    runs = {"with prior": QUICKSTART} if args.tuning or args.cache_latents else dict(RUNS)
    for k in args.cache_latents or ():
        runs[f"{k} cached"] = [*QUICKSTART, "--cache_latents", str(k)]
    with ProcessPoolExecutor(min(4, os.cpu_count()), get_context("spawn")) as pool:
        jobs = [pool.submit(run, "base", 0, None, prompts)]
        jobs += [pool.submit(run, n, seed, [*runs[n], *args.flags], prompts) for seed in args.seeds for n in runs]
        base, *results = [job.result() for job in jobs]
    results = {name: results[i :: len(runs)] for i, name in enumerate(runs)}
    cat = {name: r for name, r in results.items() if name != "cat and pot"}
    size = (
        f"{NUM_IMAGES} pictures a cell and training seed; mean (smallest-largest) of {len(args.seeds)} training seeds."
    )
    parts = [size, concept_table(base, cat, "cat"), control_table(base, results), leakage_table(base, cat, "cat")]
    if "cat and pot" in results:
        both = {"cat and pot": results["cat and pot"]}
        parts += [both_table(both["cat and pot"]), concept_table(base, both, "pot"), leakage_table(base, both, "pot")]
    text = "\n\n".join(parts)
    print(text)
    folder = ROOT / "results/concept_learning"
    name = f"{prompts} cached" if args.cache_latents else prompts
    (folder / f"{name}.md").write_text(text + "\n")
    (folder / f"{name}.json").write_text(json.dumps({"base": base, **results}, indent=1))


if __name__ == "__main__":
    main()
