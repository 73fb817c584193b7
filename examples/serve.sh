# From a training folder to what a server loads: check, scan, merge, verify, and a report to keep beside it.
adapterkit scan lora --fail-on critical
adapterkit validate lora --base base
adapterkit merge base lora -o served --checksums --verify
adapterkit report lora --base base --merged served -o served-report.html
adapterkit verify served
