"""Reports about adapters: their changes and their relations, in numbers, sentences and pictures.

`inspecting` reads headers, `measuring` computes numbers, `verdicts` writes sentences about them, `charts` draws
pictures, and `report` combines them into one HTML file. The package is not called `report`, because the function
`adapterkit.report` has that name.
"""
