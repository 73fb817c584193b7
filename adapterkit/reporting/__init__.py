"""Reports about adapters: their changes and how they relate to each other, in numbers, sentences and charts.

`inspecting` reads headers, `measuring` computes measurements, `verdicts` writes sentences about them, `charts` draws
pictures, and `report` combines them into one HTML file. The package is not called `report`, because the function
`adapterkit.report` has that name.
"""
