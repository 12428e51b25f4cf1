"""Built-in data: drawings, scenes, easy-VQA, and the captions, questions and conversations about them."""
