# From a training folder to what a server loads: scan, check, merge, verify, and a report to keep beside it.
# With --fail-on high the first line stops a script by its exit code; here the findings are only shown.
adapterkit scan lora --fail-on never
adapterkit validate lora --base base
adapterkit merge base lora -o served --checksums --verify
adapterkit report lora --base base --merged served -o served-report.html
adapterkit verify served
