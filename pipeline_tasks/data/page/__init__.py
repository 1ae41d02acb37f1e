"""`nasline data show`: a page that lets a person see what a set holds."""
