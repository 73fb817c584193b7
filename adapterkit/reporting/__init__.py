"""Reports: what adapters change, how they lie to one another and to a base, in numbers, sentences and pictures.

`facts` reads headers, `measuring` makes numbers, `verdicts` makes sentences of them, `charts` pictures, `page` one
file, and `report` puts them together. The package is not called `report`, because `adapterkit.report` is the function.
"""
