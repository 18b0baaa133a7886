#!/usr/bin/env bash
# Teaches the small model of this repository a cat that it has never seen, apart from the rest of the model, and draws
# pictures from before and after.
# Your arguments are added to the training command: bash examples/quickstart.sh --max_train_steps 100
source "$(dirname "$0")/../tools/environment.sh" requirements.txt
# keeps glibc from returning every large buffer to the system, only to ask for it again at the next step
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
export HF_HUB_OFFLINE=1

(
    set -x
    accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
        train_custom_diffusion.py \
        --pretrained_model_name_or_path assets/model \
        --instance_data_dir assets/instance/cat --instance_prompt "photo of a <new1> cat" \
        --modifier_token "<new1>" \
        --keep_apart --captions assets/captions.txt \
        --resolution 128 --train_batch_size 8 --max_train_steps 500 --noaug --hflip \
        --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 20 \
        --validation_prompt "photo of a <new1> cat on the grass" --validation_steps 100 --num_validation_images 2 \
        --output_dir results/quickstart "$@"
)
python examples/before_after.py --pretrained_model_name_or_path assets/model \
    --weights_dir results/quickstart \
    --instance_data_dir assets/instance/cat --modifier_token "<new1>" --class_prompt cat \
    --output results/quickstart/sheet.png
echo "Open results/quickstart/sheet.png to see what the model has learned."
