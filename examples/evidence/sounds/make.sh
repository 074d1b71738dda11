#!/bin/sh
# Makes the clips of this folder: every prompt once with dense attention and once patched, from the same noise, three minutes
# of one, and a minute of three. From the small pipeline that was trained for this repository, so they sound like it.
#     sh examples/evidence/sounds/make.sh [PYTHON]
set -eu
cd "$(dirname "$0")"
python=${1:-python}
for prompt in "a fast tabla rhythm" "a slow bell" "a medium breakbeat" "a medium guitar phrase"; do
    "$python" ../../generate.py "$prompt" --compare --runs 1 --output "$(echo "$prompt" | tr ' ' '_').mp3"
done
"$python" ../../generate.py "a fast tabla rhythm" --seconds 180 --output three_minutes.mp3
"$python" ../../generate.py "a medium breakbeat" --at 20 "a slow bell" --at 40 "a fast tabla rhythm" --seconds 60 \
    --output three_sounds.mp3
rm -f ./*.png
