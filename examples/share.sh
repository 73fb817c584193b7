# One adapter for several tools. Nothing is lost in silence: a format that cannot hold it refuses, with the list.
adapterkit convert lora for-vllm --to peft --profile vllm --on-loss fold --base base
adapterkit convert lora native.safetensors --to adapterkit
adapterkit diff lora native.safetensors
