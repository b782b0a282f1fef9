"""One page about one or more runs, from their directories alone: `python -m trainer.report`. Starts nothing.

Files:
    chart     a chart as SVG
    command   python -m trainer.report
    curves    curves of several runs, put into charts
    hours     where the hours of a run went, from its event logs
    interval  how often to save, by Young and by Daly
    page/     style and script of the page
    pages     the report as one HTML file
    runs      what is known of a run, read from its directory
    tables    the tables of the report
    texts     the report as Markdown and as JSON
"""
