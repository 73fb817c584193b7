# Smaller: keep 99 % of each squared norm, and say what that costs.
adapterkit resize lora --energy 0.99 --dtype fp16 -o small
adapterkit inspect small
adapterkit report lora small --base base -o shrunk.html
