"""An image file of any kind becomes upright pixels in sRGB. Knows neither sources nor shards.

Files:
    channels    planes of images of 1 to 8 channels, in image files or arrays
    colour      colour profiles to sRGB
    decode      decodes; refuses what would come out wrong
    metadata    separates pixels from metadata
    perceptual  near-duplicates by a hash of 64 bits
    shown       what images of any number of channels look like
    tiff        TIFF files of any number of channels
"""
