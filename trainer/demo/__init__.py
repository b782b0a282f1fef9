"""A page on this machine to try a trained model by hand. Knows neither training nor measures of quality.

Files:
    actions  what the page can ask for: a function for each of its forms
    command  python -m trainer.demo
    page/    the page itself: HTML, style and script, with nothing from other hosts
    server   answers the page's requests on 127.0.0.1, to those who know the token
"""
