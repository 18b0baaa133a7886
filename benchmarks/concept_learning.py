#!/usr/bin/env python3
"""Measures what the trainer teaches the embedded model, and what it spoils; prints the tables of docs/measurements.md.

    python benchmarks/concept_learning.py [--seeds 0 1 2] [--quick] [-- --max_train_steps 400]
    python benchmarks/concept_learning.py --runs "cat kept apart" --prompts tuning --merge_flags="--weight 30"
    python benchmarks/concept_learning.py --cache_latents 1 2 4
    python benchmarks/concept_learning.py --ranks 4 8 16 32
    python benchmarks/concept_learning.py --shared_background
    python benchmarks/concept_learning.py --second
    python benchmarks/concept_learning.py --model assets/model-xl --runs "with prior" "without prior" "cat kept apart"

Trains in processes of their own, as a user does, with the quickstart's flags (flags after `--` are added to them), once
per seed; scripts/merge.py then joins the results, or keeps one apart. The pictures are judged by tools/measure.py,
which knows colours and places and has no learned part. There are disjoint sets of prompts and backgrounds, none among
the instance pictures: settings were chosen on "tuning", the tables come from "final", and the prompts of "unlike" begin
as none of merge.py's do. Before and after start from the same noise. --cache_latents compares the cat with prior
preservation as it is with that on so many fixed augmentations of each picture, --ranks with that exported as LoRAs.
--shared_background compares what helps if all five pictures of the cat have the same background. --second trains pot
and banded cat on the model that has learned the cat. --sheet also draws cat and pot alone, together and joined.
Everything lies in results/concept_learning; an interrupted run goes on where it stopped.
"""

import argparse
import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tools"), str(ROOT / "examples")]

# ruff: noqa: E402
import before_after
import measure
import world
from before_after import WEIGHTS_NAME, draw_prompts, draw_row, generate, load_concept, load_pipeline, load_word, stack

# The flags of examples/quickstart.sh; paths are relative to the repository. Of a run without --keep_apart, the word
# starts from one that describes the concept.
MODEL = ["--pretrained_model_name_or_path", "assets/model"]
CAT = ["--instance_data_dir", "assets/instance/cat", "--instance_prompt", "photo of a <new1> cat"]
CAT += ["--modifier_token", "<new1>"]
YELLOW = ["--initializer_token", "yellow"]
PRIOR = ["--with_prior_preservation", "--prior_loss_weight", "0.25", "--real_prior"]
CAT_CLASS = ["--class_data_dir", "assets/regularization/cat", "--class_prompt", "cat"]
SETTINGS = ["--resolution", "128", "--train_batch_size", "8", "--max_train_steps", "500", "--noaug", "--hflip"]
SETTINGS += ["--learning_rate", "2e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20"]
APART = ["--keep_apart", "--captions", "assets/captions.txt"]
QUICKSTART = [*MODEL, *CAT, *SETTINGS, *APART]
PLAIN = [*MODEL, *CAT, *YELLOW, *SETTINGS]
WITH_PRIOR = [*MODEL, *CAT, *YELLOW, *PRIOR, *CAT_CLASS, *SETTINGS]
POT = ["--instance_data_dir", "assets/instance/pot", "--instance_prompt", "photo of a <new2> pot"]
POT += ["--modifier_token", "<new2>"]
ORANGE = ["--initializer_token", "orange"]
BANDED = ["--instance_data_dir", "results/banded_cat", "--instance_prompt", "photo of a <new3> cat"]
BANDED += ["--modifier_token", "<new3>"]
BLUE = ["--initializer_token", "blue"]
BOTH = ["--concepts_list", "concept_list.json", "--modifier_token", "<new1>+<new2>", "--max_train_steps", "800"]
TWO_CATS = ["--concepts_list", "results/two_cats.json", "--modifier_token", "<new1>+<new3>"]
TWO_CATS += ["--max_train_steps", "800"]
POT_CLASS = ["--class_data_dir", "assets/regularization/pot", "--class_prompt", "pot"]

RUNS = {  # name: (concepts, flags of a training or results that are merged)
    "with prior": (["cat"], WITH_PRIOR),
    "without prior": (["cat"], PLAIN),
    "pot without prior": (["pot"], [*MODEL, *POT, *ORANGE, *SETTINGS]),
    "banded cat without prior": (["banded cat"], [*MODEL, *BANDED, *BLUE, *SETTINGS]),
    "cat and pot": (["cat", "pot"], [*MODEL, *PRIOR, *SETTINGS, *BOTH, "--initializer_token", "yellow+orange"]),
    "two cats": (["cat", "banded cat"], [*MODEL, *SETTINGS, *TWO_CATS, "--initializer_token", "yellow+blue"]),
    "cat kept apart": (["cat"], ["without prior"]),
    "with prior, kept apart": (["cat"], ["with prior"]),
    "pot kept apart": (["pot"], ["pot without prior"]),
    "cat and pot joined": (["cat", "pot"], ["without prior", "pot without prior"]),
    "two cats joined": (["cat", "banded cat"], ["without prior", "banded cat without prior"]),
    "three joined": (
        ["cat", "pot", "banded cat"],
        ["without prior", "pot without prior", "banded cat without prior"],
    ),
    "pot with prior": (["pot"], [*MODEL, *POT, *ORANGE, *PRIOR, *POT_CLASS, *SETTINGS]),
    "apart": (["cat"], QUICKSTART),
    "pot apart": (["pot"], [*MODEL, *POT, *SETTINGS, *APART]),
    "banded cat apart": (["banded cat"], [*MODEL, *BANDED, *SETTINGS, *APART]),
    "apart, from yellow": (["cat"], [*QUICKSTART, *YELLOW]),
    "pot apart, from orange": (["pot"], [*MODEL, *POT, *SETTINGS, *APART, *ORANGE]),
    "pot apart, from pll": (["pot"], [*MODEL, *POT, *SETTINGS, *APART, "--initializer_token", "pll"]),
    "banded cat apart, from blue": (["banded cat"], [*MODEL, *BANDED, *SETTINGS, *APART, *BLUE]),
    "cat and pot, apart": (["cat", "pot"], [*MODEL, *SETTINGS, *APART, *BOTH]),
    "two cats, apart": (["cat", "banded cat"], [*MODEL, *SETTINGS, *APART, *TWO_CATS]),
    "cat and pot, apart, joined": (["cat", "pot"], ["apart", "pot apart"]),
    "two cats, apart, joined": (["cat", "banded cat"], ["apart", "banded cat apart"]),
    "three, apart, joined": (["cat", "pot", "banded cat"], ["apart", "pot apart", "banded cat apart"]),
    "cat from yellow and pot, joined": (["cat", "pot"], ["apart, from yellow", "pot apart"]),
    "cat from yellow and banded cat, joined": (["cat", "banded cat"], ["apart, from yellow", "banded cat apart"]),
    "cat and banded cat from blue, joined": (["cat", "banded cat"], ["apart", "banded cat apart, from blue"]),
    "three from different words, joined": (
        ["cat", "pot", "banded cat"],
        ["apart, from yellow", "pot apart", "banded cat apart, from blue"],
    ),
}

SECOND_RUNS = {  # of --second
    "pot after the cat": (["cat", "pot"], RUNS["pot apart"][1]),
    "banded cat after the cat": (["cat", "banded cat"], RUNS["banded cat apart"][1]),
}

SHARED_BACKGROUND = "beach"
SHARED_RUNS = {  # of --shared_background
    "without prior": RUNS["without prior"],
    **{
        name: (["cat"], [*PLAIN, "--instance_data_dir", f"results/{folder}", *flags])
        for name, folder, flags in (
            ("five backgrounds, captions", "cat_with_captions", []),
            ("one background", "cat_at_the_beach", []),
            ("one background, masks", "cat_at_the_beach_cut_out", ["--alpha_mask"]),
            ("one background, captions", "cat_at_the_beach_with_captions", []),
        )
    },
}

TOKENS = {"cat": "<new1>", "pot": "<new2>", "banded cat": "<new3>"}  # the last word of a concept is its class
INSTANCE_BACKGROUNDS = {"cat": ["blue", "white", "beach", "black", "night"]}  # as in assets/instance
INSTANCE_BACKGROUNDS["banded cat"] = ["blue", "yellow", "black", "beach", "night"]
BACKGROUNDS = {
    "tuning": {"cat": ["orange", "pink"], "pot": ["pink", "night"], "banded cat": ["orange", "grass"]},
    "final": {
        "cat": ["yellow", "green", "gray"],
        "pot": ["green", "gray", "beach", "grass"],
        "banded cat": ["green", "gray", "sunset"],
    },
}
OPENINGS = {
    "tuning": ["photo of a {thing}", "a picture of a {thing}"],
    "final": ["photo of a {thing}", "a photo of a {thing}", "a {thing}", "photo of a big {thing}"],
    "unlike": [
        "yesterday I saw a {thing}",
        "a picture of a huge {thing}",
        "here is the {thing} again",
        "look, one more {thing}",
    ],
}
BACKGROUNDS["unlike"] = BACKGROUNDS["final"]
SEEDS = {"tuning": 100, "final": 200, "unlike": 300}  # of control prompts, wordings of the background, and noise
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
    "banded cat": [
        "blue, white and red cat",
        "blue, white and red striped cat",
        "blue and white striped cat",
        "white cat with red stripes",
        "half blue half red cat",
    ],
}
TEMPLATES = ROOT / "scripts/templates.txt"
CAPTIONS = ROOT / "assets/captions.txt"  # of the small world: the model knows few words of scripts/captions.txt
ENVIRONMENT = {
    # glibc would return every large buffer to the system and ask for it again at the next step
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_NUM_THREADS": "1",  # one-thread runs side by side are faster than runs of more threads in turn
}
NUM_IMAGES, NUM_CONTROLS, NUM_RENDERS = 16, 100, 8  # of a thing, of all controls, and true ones on a background


def parse_args():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure what the trainer teaches the embedded model.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--quick", action="store_true", help="a step, a seed, few rough pictures: to see that it works")
    parser.add_argument("--prompts", choices=list(OPENINGS), default="final", help="the set that is judged")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME", help="only these")
    parser.add_argument("--merge_flags", type=shlex.split, default=[], help="flags for scripts/merge.py, in one string")
    parser.add_argument("--cache_latents", type=int, nargs="+", metavar="K", help="compare cached latents, no more")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="R", help="compare exported LoRAs, no more")
    parser.add_argument("--shared_background", action="store_true", help="compare masks and captions, no more")
    parser.add_argument("--second", action="store_true", help="train concepts on the cat's model, no more")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw cat and pot alone, together and joined there")
    parser.add_argument("--model", default=MODEL[1], help="another base model that draws the same world")
    parser.add_argument("flags", nargs="*", help="flags for the trainer, after --")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.flags = args.seeds[:1], [*args.flags, "--max_train_steps", "1"]
    return args


# ---------- Pictures and their measures -------------------------------------------------------------------------


def concept_prompts(prompts, concept, thing):
    """NUM_IMAGES prompts of a thing on the set's backgrounds for a concept, as (prompt, background name) pairs."""
    rng = random.Random(SEEDS[prompts])
    pairs = [(background, o) for o in OPENINGS[prompts] for background in BACKGROUNDS[prompts][concept]]
    pairs = [pairs[i % len(pairs)] for i in range(NUM_IMAGES)]
    return [(f"{o.format(thing=thing)} {world.where(background, rng)}", background) for background, o in pairs]


def draw(pipeline, prompts, seed):
    """One picture for each prompt."""
    images = []
    for start in range(0, len(prompts), 25):
        images += generate(pipeline, prompts[start : start + 25], seed + start)
    return images


def judge(images, backgrounds, concept):
    """Mean overlap with a concept's colours and layout, shares of right background and shape, and the main colours."""
    found = [measure.measure(image) for image in images]
    return {
        "colour": float(np.mean([measure.concept_color(image, concept) for image in images])),
        "layout": float(np.mean([measure.concept_layout(image, concept) for image in images])),
        "background": float(np.mean([f["background"] == name for f, name in zip(found, backgrounds, strict=True)])),
        "shape": float(np.mean([f["kind"] == concept.split()[-1] for f in found])),
        "main colours": [next(iter(measure.top_colors(f["histogram"], 1))) for f in found],
    }


def show(folder, name, images):
    """Writes pictures side by side, eight in a row."""
    folder.mkdir(exist_ok=True)
    sheet = Image.new("RGB", (8 * 132, -(-len(images) // 8) * 132), "gray")
    for i, image in enumerate(images):
        sheet.paste(image, (i % 8 * 132 + 2, i // 8 * 132 + 2))
    sheet.save(folder / f"{name}.png")


def judge_thing(pipeline, folder, prompts, concept, thing):
    """Draws a thing on the set's backgrounds for a concept and measures it against each concept."""
    pairs = concept_prompts(prompts, concept, thing)
    images = draw(pipeline, [prompt for prompt, _ in pairs], SEEDS[prompts])
    show(folder / prompts, f"{concept}, {thing}", images)
    return {other: judge(images, [name for _, name in pairs], other) for other in TOKENS}


def judge_pipeline(pipeline, folder, prompts, concepts):
    """All measures of a base or trained pipeline: the concepts, plain things of their classes, control prompts."""
    results = {"concepts": {}, "leakage": {}}
    for concept in concepts:
        kind = concept.split()[-1]
        words = judge_thing(pipeline, folder, prompts, concept, f"{TOKENS[concept]} {kind}")
        plain = [judge_thing(pipeline, folder, prompts, concept, thing)[concept] for thing in (kind, f"red {kind}")]
        results["concepts"][concept], results["leakage"][concept] = words, plain
    controls = world.eval_prompts(NUM_CONTROLS, SEEDS[prompts])
    images = draw(pipeline, [caption for caption, _ in controls], SEEDS[prompts] + NUM_IMAGES)
    show(folder / prompts, "controls", images)
    results["control"] = measure.score(controls, images)
    return results


def judge_limits(pipeline, folder, prompts):
    """Measures of the concepts in words, of true renders and of their round trip through the autoencoder."""
    import torch

    results = {}
    for concept in TOKENS:
        words = {thing: judge_thing(pipeline, folder, prompts, concept, thing)[concept] for thing in WORDS[concept]}
        rng, backgrounds = random.Random(SEEDS[prompts]), NUM_RENDERS * BACKGROUNDS[prompts][concept]
        renders = [world.render_concept(concept, background, rng)[0] for background in backgrounds]
        with torch.no_grad():
            pixels = pipeline.image_processor.preprocess(renders).to(pipeline.device)
            decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
        returned = pipeline.image_processor.postprocess(decoded)
        show(folder / prompts, f"ceiling {concept}", [*renders[:8], *returned[:8]])
        truth = {name: judge(images, backgrounds, concept) for name, images in
                 (("true renders", renders), ("autoencoder", returned))}  # fmt: skip
        results[concept] = {"words": words, **truth}
    return results


# ---------- Runs ------------------------------------------------------------------------------------------------


def set_up(model, is_quick):
    """Sets, in each process, the base model and, with --quick, how few pictures there are."""
    global NUM_IMAGES, NUM_CONTROLS, NUM_RENDERS
    MODEL[1] = model
    if is_quick:
        NUM_IMAGES, NUM_CONTROLS, NUM_RENDERS = 1, 2, 1
        before_after.INFERENCE_STEPS = 2


def folder_of(name, seed, *key):
    """The folder of a run, with a name that follows from everything on which its content depends."""
    model = (ROOT / MODEL[1] / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    digest = hashlib.sha256(repr(key).encode() + model).hexdigest()[:6]
    folder = ROOT / "results/concept_learning" / f"{name} {seed} {digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def start(folder, *command):
    """Runs a script of this repository; what it says goes into a file."""
    with open(folder / "log.txt", "w") as log:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=log, stderr=log, check=True)


def train(name, seed, flags, script=("train_custom_diffusion.py",)):
    """Trains by a script, given with its first words, unless that was done; returns the folder of the result."""
    folder = folder_of(name, seed, flags)
    if not (folder / f"{WEIGHTS_NAME}.safetensors").exists():
        output = [*MODEL, "--seed", seed, "--output_dir", folder, "--report_to", "none"]
        start(folder, *script, *flags, *output)
    return folder


def train_second(name, seed, flags, first):
    """Trains on the model that has learned the cat, unless that was done; returns the folder of the result."""
    folder = folder_of(name, seed, flags, first.name)
    model, captions = folder / "model", folder / "captions.txt"
    if not (folder / f"{WEIGHTS_NAME}.safetensors").exists():
        captions.write_text(CAPTIONS.read_text() + TEMPLATES.read_text().replace("{}", "<new1> cat"))
        start(folder, "scripts/export.py", first, *MODEL, "--format", "model", "--output", model)
        own = ["--pretrained_model_name_or_path", model, "--captions", captions]
        start(folder, "train_custom_diffusion.py", *flags, *own, "--seed", seed, "--output_dir", folder)
    return folder


def merge(name, seed, results, flags):
    """Merges results by scripts/merge.py, unless that was done; returns the folder of the new one."""
    captions = CAPTIONS.read_text()
    code = [(ROOT / "scripts" / name).read_bytes() for name in ("merge.py", "results.py")]
    folder = folder_of(name, seed, flags, [result.name for result in results], code, captions)
    if not (folder / f"{WEIGHTS_NAME}.safetensors").exists():
        options = ["--captions", CAPTIONS, "--output_dir", folder, *flags]
        start(folder, "scripts/merge.py", *results, *MODEL, *options)
    return folder


def export(name, seed, result, rank):
    """Exports a result as a LoRA by scripts/export.py, unless that was done; returns the folder of the file."""
    folder = folder_of(name, seed, rank, result.name)
    if not (folder / "lora.safetensors").exists():
        start(folder, "scripts/export.py", result, *MODEL, "--rank", rank, "--output", folder / "lora.safetensors")
    return folder


def words_of(folder):
    """The new words that a result has learned."""
    return [token for token in TOKENS.values() if (folder / f"{token}.safetensors").exists()]


def measures(folder, prompts, concepts, limits=False):
    """Draws and measures what a folder holds, unless that was done; with `limits` it is the base model."""
    settings = (BACKGROUNDS[prompts], OPENINGS[prompts], SEEDS[prompts], WORDS, NUM_IMAGES, NUM_CONTROLS)
    digest = hashlib.sha256(repr((*settings, NUM_RENDERS, before_after.INFERENCE_STEPS)).encode()).hexdigest()
    file = folder / f"{prompts} {digest[:6]}.json"
    if file.exists():
        return json.loads(file.read_text())
    model = folder / "model"  # of a second concept
    pipeline = load_pipeline(model if model.exists() else ROOT / MODEL[1])
    if (folder / "lora.safetensors").exists():
        pipeline.load_lora_weights(folder / "lora.safetensors")
        for concept in concepts:
            load_word(pipeline, folder / f"{TOKENS[concept].strip('<>')}.safetensors", TOKENS[concept])
    elif not limits:
        load_concept(pipeline, folder, words_of(folder))
    results = judge_pipeline(pipeline, folder, prompts, concepts)
    if limits:
        results["limits"] = judge_limits(pipeline, folder, prompts)
    file.write_text(json.dumps(results, indent=1))
    return results


def background_measures(folder, prompts):
    """The cat's measures, and the share of SHARED_BACKGROUND where the prompt names no background.

    Of what a folder holds or, if it holds nothing, of the base model. Drawn and measured unless that was done.
    """
    file = folder / f"{prompts} backgrounds.json"
    if not file.exists():
        pipeline, is_trained = load_pipeline(ROOT / MODEL[1]), (folder / f"{WEIGHTS_NAME}.safetensors").exists()
        if is_trained:
            load_concept(pipeline, folder, [TOKENS["cat"]])
        results = judge_thing(pipeline, folder, prompts, "cat", f"{TOKENS['cat']} cat")["cat"]
        openings = OPENINGS[prompts] * max(1, 2 * NUM_IMAGES // len(OPENINGS[prompts]))
        thing = f"{TOKENS['cat']} cat" if is_trained else "cat"
        images = draw(pipeline, [opening.format(thing=thing) for opening in openings], SEEDS[prompts])
        show(folder / prompts, "no background asked for", images)
        found = [measure.measure(image)["background"] == SHARED_BACKGROUND for image in images]
        file.write_text(json.dumps(results | {"unasked": float(np.mean(found))}))
    return json.loads(file.read_text())


def render_pictures():
    """Renders the instance pictures that assets/instance lacks, and lists those of the two cats."""
    at_the_beach = [SHARED_BACKGROUND] * 5
    render_instances("banded_cat", "banded cat", INSTANCE_BACKGROUNDS["banded cat"])
    render_instances("cat_with_captions", "cat", INSTANCE_BACKGROUNDS["cat"], captions=True)
    render_instances("cat_at_the_beach", "cat", at_the_beach)
    render_instances("cat_at_the_beach_cut_out", "cat", at_the_beach, cut_out=True)
    render_instances("cat_at_the_beach_with_captions", "cat", at_the_beach, captions=True)
    cats = [{"instance_data_dir": flags[1], "instance_prompt": flags[3]} for flags in (CAT, BANDED)]
    (ROOT / "results" / "two_cats.json").write_text(json.dumps(cats))


def render_instances(name, concept, backgrounds, cut_out=False, captions=False):
    """Renders pictures of a concept, with the object as their alpha channel, or captions that name the background."""
    folder, rng = ROOT / "results" / name, random.Random(f"0 {concept}")
    folder.mkdir(parents=True, exist_ok=True)
    for i, background in enumerate(backgrounds):
        image, attributes = world.render_concept(concept, background, rng)
        if cut_out:
            image.putalpha(world.draw_mask(attributes).resize(image.size))
        image.save(folder / f"{i}.png")
        if captions:
            phrase = world.where(background, random.Random(i))
            (folder / f"{i}.txt").write_text(f"photo of a {TOKENS[concept]} {concept.split()[-1]} {phrase}")


def draw_sheet(folders, file):
    """Draws cat and pot from the same noise: trained alone, together, and joined. `folders` has those by run."""
    prompts = {"cat": ["on the grass", "on a gray background", "on a green background"]}
    prompts["pot"] = ["on the beach", "on a gray background", "on a green background"]
    prompts = {key: [f"photo of a {TOKENS[key]} {key} {where}" for where in value] for key, value in prompts.items()}
    rows = {"alone": ["without prior", "pot without prior"]}
    rows |= {"together": 2 * ["cat and pot"], "joined": 2 * ["cat and pot joined"]}
    sheet = [draw_prompts([*prompts["cat"], *prompts["pot"]])]
    for label, runs in rows.items():
        images = []
        for concept, run in zip(prompts, runs, strict=True):
            pipeline, folder = load_pipeline(ROOT / MODEL[1]), folders[run]
            load_concept(pipeline, folder, words_of(folder))
            images += generate(pipeline, prompts[concept], seed=0)
        sheet.append(draw_row(label, images))
    stack(sheet).save(file)


# ---------- Tables ----------------------------------------------------------------------------------------------


def span(values):
    """Mean and, of several values, smallest and largest."""
    values = np.atleast_1d(values)
    return f"{values.mean():.2f}" + (f" ({values.min():.2f}-{values.max():.2f})" if len(values) > 1 else "")


def share_as_before(colours, before):
    """Share of pictures whose main colour is that of the picture from the same noise before the training."""
    return np.mean([now == then for now, then in zip(colours, before, strict=True)])


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def concept_table(base, trained, concept):
    """How a concept's pictures score: before, in words, after each run, and the limits; shares of what limits allow."""
    names, limits = ("colour", "layout", "background", "shape"), base["limits"][concept]

    def row(label, results):
        shares = [span([result[n] / limits["autoencoder"][n] for result in results]) for n in names[:2]]
        return [label, *(span([result[name] for result in results]) for name in names), *shares]

    wording, words = max(limits["words"].items(), key=lambda item: item[1]["colour"] + item[1]["layout"])
    rows = [row("before", [base["concepts"][concept][concept]]), row(f'before, "{wording}"', [words])]
    rows += [row(name, [result["concepts"][concept][concept] for result in results]) for name, results in trained]
    rows += [row(name, [limits[key]]) for name, key in LIMITS.items()]
    thing = f"{TOKENS[concept]} {concept.split()[-1]}"
    return table([f'"{thing}"', *names, "share of colour", "share of layout"], rows)


LIMITS = {"true pictures through the autoencoder": "autoencoder", "true pictures": "true renders"}


def control_table(base, trained):
    """Accuracy on prompts without the new words, before and after each run."""
    names = list(base["control"])
    rows = [["prompts", *(base["control"][name]["n"] for name in names)]]
    for label, results in [("before", [base]), *trained]:
        rows.append([label, *(span([result["control"][name]["accuracy"] for result in results]) for name in names)])
    return table(["control prompts", *names], rows)


def leakage_table(base, trained, concept):
    """The plain class, and the class in red: overlap with the concept; main colours, from the same noise as before."""
    kind, before = concept.split()[-1], base["leakage"][concept][0]["main colours"]
    header = [f'"{kind}": colour', "layout", "main colour as before", "main colours"]
    rows = []
    for label, results in [("before", [base]), *trained]:
        plain, red = zip(*(result["leakage"][concept] for result in results), strict=True)
        colours = [found["main colours"] for found in plain]
        same = [share_as_before(found, before) for found in colours]
        overlaps = [
            [span([found[name] for found in things]) for name in ("colour", "layout")] for things in (plain, red)
        ]
        is_red = span([np.mean([colour == "red" for colour in found["main colours"]]) for found in red])
        number = ", ".join(str(len(set(found))) for found in colours)
        rows.append([label, *overlaps[0], span(same), number, *overlaps[1], is_red])
    return table(["without the new word", *header, f'"red {kind}": colour', "layout", "main colour red"], rows)


def words_table(trained):
    """What each of several words brings: its own concept, and not another's."""
    rows = []
    for label, results in trained:
        concepts = list(results[0]["concepts"])
        for concept in concepts if len(concepts) > 1 else ():
            found = [result["concepts"][concept] for result in results]
            overlaps = [span([f[other][name] for f in found]) for other in TOKENS for name in ("colour", "layout")]
            rows.append([label, f'"{TOKENS[concept]} {concept.split()[-1]}"', *overlaps])
    return table(
        ["run", "prompt", *(f"{concept}, {name}" for concept in TOKENS for name in ("colour", "layout"))], rows
    )


def background_table(pool, folders, prompts):
    """What masks and captions help where instance pictures share a background; `folders` by (run, seed)."""
    names = ("colour", "layout", "background", "shape", "unasked")
    jobs = {("before", 0): pool.submit(background_measures, folder_of("base", 0), prompts)}
    jobs |= {key: pool.submit(background_measures, folder, prompts) for key, folder in folders.items()}
    rows = []
    for run in dict.fromkeys(name for name, _ in jobs):
        found = [job.result() for (name, _), job in jobs.items() if name == run]
        rows.append([run, *(span([results[name] for results in found]) for name in names)])
    return table(["instance pictures", *names[:-1], f"{SHARED_BACKGROUND}, unasked"], rows)


def report(text, name):
    """Prints tables and keeps them as <name>.md."""
    print(text)
    (ROOT / "results/concept_learning" / f"{name}.md").write_text(f"{text}\n")


def main():
    """Runs everything, two or more processes side by side, and prints the tables."""
    args = parse_args()
    os.environ.update(ENVIRONMENT)
    prompts, runs = args.prompts, {name: RUNS[name] for name in args.runs}
    if args.cache_latents or args.ranks:
        runs = {"with prior": RUNS["with prior"]}
    if args.shared_background:
        runs = SHARED_RUNS
    if args.second:
        runs = {"apart": RUNS["apart"]}
    for k in args.cache_latents or ():
        runs[f"{k} cached"] = (["cat"], [*WITH_PRIOR, "--cache_latents", str(k)])
    render_pictures()
    settings = (args.model, args.quick)
    set_up(*settings)
    with ProcessPoolExecutor(min(4, os.cpu_count()), initializer=set_up, initargs=settings) as pool:
        sources = {name for _, flags in runs.values() if flags[0] in RUNS for name in flags}
        trainings = {name: RUNS.get(name, runs.get(name))[1] for name in [*sources, *runs]}
        trainings = {name: [*flags, *args.flags] for name, flags in trainings.items() if flags[0] not in RUNS}
        jobs = {(n, seed): pool.submit(train, n, seed, trainings[n]) for seed in args.seeds for n in trainings}
        folders = {key: job.result() for key, job in jobs.items()}
        if args.shared_background:
            report(background_table(pool, folders, prompts), f"{prompts} backgrounds")
            return
        base = pool.submit(measures, folder_of("base", 0), prompts, list(TOKENS), limits=True)
        for name, (_, flags) in runs.items():
            for seed in args.seeds if name not in trainings else ():
                results = [folders[source, seed] for source in flags]
                folders[name, seed] = merge(name, seed, results, args.merge_flags)
        for rank in args.ranks or ():
            name, runs[f"rank {rank}"] = f"rank {rank}", runs["with prior"]
            for seed in args.seeds:
                folders[name, seed] = export(name, seed, folders["with prior", seed], rank)
        if args.second:
            runs |= SECOND_RUNS
            jobs = {}
            for name, (_, flags) in SECOND_RUNS.items():
                for seed in args.seeds:
                    first = folders["apart", seed]
                    jobs[name, seed] = pool.submit(train_second, name, seed, [*flags, *args.flags], first)
            folders |= {key: job.result() for key, job in jobs.items()}
        jobs = [(n, pool.submit(measures, folders[n, s], prompts, runs[n][0])) for s in args.seeds for n in runs]
        results = {name: [job.result() for other, job in jobs if other == name] for name in runs}
        base = base.result()
    if args.sheet:
        draw_sheet({name: folders[name, args.seeds[0]] for name in runs}, args.sheet)
    size = f"{NUM_IMAGES} pictures a prompt, {NUM_CONTROLS} of controls; "
    size += f"mean (smallest-largest) of {len(args.seeds)} training seeds."
    parts = [size, control_table(base, results.items())]
    if any(len(concepts) > 1 for concepts, _ in runs.values()):
        parts.append(words_table(results.items()))
    for concept in TOKENS:
        found = [(name, judged) for name, judged in results.items() if concept in runs[name][0]]
        if found:
            parts += [concept_table(base, found, concept), leakage_table(base, found, concept)]
    kinds = {"cached": args.cache_latents, "ranks": args.ranks, "second": args.second, "runs": True}
    name = f"{prompts} {next(kind for kind, is_given in kinds.items() if is_given)}"
    name += f" {Path(args.model).name}" if args.model != "assets/model" else ""
    report("\n\n".join(parts), name)


if __name__ == "__main__":
    main()
