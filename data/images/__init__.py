"""An image file of any kind becomes upright pixels in sRGB. Knows neither sources nor shards.

Files:
    colour      colour profiles to sRGB
    decode      decodes; refuses what would come out wrong
    metadata    separates pixels from metadata
    perceptual  near-duplicates by a hash of 64 bits
    tiff        TIFF files of any number of channels
"""
