"""Reports about adapters: their changes and their relations, in numbers, sentences and pictures.

`facts` reads headers, `measuring` computes numbers, `verdicts` writes sentences about them, `charts` draws pictures,
`page` builds one HTML file, and `report` combines them. The package is not called `report`, because the function
`adapterkit.report` has that name.
"""
