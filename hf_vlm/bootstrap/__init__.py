"""CapFilt (BLIP, section 3.3): caption images, filter captions."""
