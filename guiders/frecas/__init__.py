"""FreCaS: pictures in stages of growing size."""
